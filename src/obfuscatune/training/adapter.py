"""LoRA factors: adds them to a model, checks, saves and loads them in PEFT's format, and clips their gradients.

A profile may train LoRA on the worker (`protection.lora_on_worker`). The optimizer is then a `RemotelyOptimized`, whose
gradients and moments are on the worker.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from obfuscatune.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_LARGEST_CONFIG_BYTES = 2**20
Targets = Literal["all-linear"] | tuple[str, ...]
"""The layers that get LoRA factors: all linear ones except the head, or those with these names."""


def add_lora(
    model: "PreTrainedModel",
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: Targets,
    seed: int,
) -> "PeftModel":
    """Wrap a model, protected or plain, in PEFT with fresh factors: A uniform as in PEFT, B zero.

    Each A has its own generator, seeded by (seed, parameter name): the factors depend neither on other random numbers
    nor on the order of the layers.

    Raises:
        ConfigError: a target names no layer, or one that cannot take LoRA.
    """
    check_targets(model, targets)
    peft_model = _wrap(model, _lora_config(r, alpha, dropout, targets))
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." in name:
            _draw(parameter, f"{seed}/{name}")
    return peft_model


def check_lora(skeleton: "PreTrainedModel", targets: Targets) -> None:
    """Check that `add_lora` will accept `targets`, on a model without weights (on the meta device).

    Raises:
        ConfigError: as `add_lora`.
    """
    check_targets(skeleton, targets)
    _wrap(skeleton, _lora_config(1, 1.0, 0.0, targets), low_cpu_mem_usage=True)


def check_targets(model: torch.nn.Module, targets: Targets) -> None:
    """Check that every target names a layer. PEFT ignores a target without a layer if another target has one.

    Raises:
        ConfigError: a target names no layer.
    """
    if isinstance(targets, str):
        return
    paths = [path for path, _ in model.named_modules()]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            linear = {path.rpartition(".")[2] for path, module in model.named_modules() if _is_linear(module)}
            near = get_close_matches(target, linear, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the linear layers are {', '.join(sorted(linear))}"
            raise ConfigError(f"--lora-targets: the model has no layer {target}; {hint}")


def check_adapter(skeleton: "PreTrainedModel", directory: Path, *, weights_at_hand: bool) -> None:
    """Check that `load_adapter` will accept an adapter, on a model without weights (on the meta device).

    Args:
        weights_at_hand: whether the model's weights will be in this process.

    Raises:
        ModelFileError: as `load_adapter`; or the adapter needs weights that will not be in this process.
    """
    config = _read_config(directory)
    needs = [name for name in ("use_dora", "target_parameters") if getattr(config, name, None)]
    if needs and not weights_at_hand:
        raise ModelFileError(
            f"{directory / CONFIG}: {needs[0]}: such an adapter needs the weights themselves, and a protected model "
            "has them on the worker; use LoRA or rsLoRA on target_modules, or --plain"
        )
    wrapped = _wrap_as_saved(skeleton, config, directory, low_cpu_mem_usage=True)
    weights = directory / WEIGHTS
    try:
        with safe_open(weights, "pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{weights}: not a whole safetensors file: {error}") from error
    _check_shapes(wrapped, found, where=str(weights))


def load_adapter(model: "PreTrainedModel", directory: Path) -> "PeftModel":
    """Wrap a model in PEFT with the adapter of a directory, in evaluation mode.

    Raises:
        ModelFileError: the directory has no adapter in safetensors, or the adapter is for another model.
    """
    peft_model = _wrap_as_saved(model, _read_config(directory), directory)
    weights = directory / WEIGHTS
    set_adapter_weights(peft_model, weights.read_bytes(), where=str(weights))
    return peft_model.eval()


def _read_config(directory: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    weights, config_file = directory / WEIGHTS, directory / CONFIG
    for file in (weights, config_file):
        if not file.is_file():
            raise ModelFileError(f"{directory}: not an adapter: there is no {file.name}")
    if config_file.stat().st_size > _LARGEST_CONFIG_BYTES:
        raise ModelFileError(f"{config_file}: larger than {_LARGEST_CONFIG_BYTES} bytes")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelFileError(f"{config_file}: not an adapter's configuration: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ModelFileError(f"{config_file}: expected a LoRA adapter, found {config.peft_type}")
    return config


def _wrap_as_saved(model: "PreTrainedModel", config: Any, directory: Path, **how: bool) -> "PeftModel":
    try:
        return _wrap(model, config, **how)
    except ConfigError as error:
        raise ModelFileError(f"{directory}: this adapter does not fit the model: {error}") from error


def adapter_files(peft_model: "PeftModel") -> dict[str, bytes]:
    """The adapter in PEFT's format, as contents by file name. Equal factors give equal bytes."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    config = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    return {
        WEIGHTS: save_tensors({name: tensor.contiguous().cpu() for name, tensor in state.items()}),
        CONFIG: json.dumps(config, default=_jsonable, indent=2, sort_keys=True).encode(),
    }


def set_adapter_weights(peft_model: "PeftModel", weights: bytes, *, where: str) -> None:
    """Set the factors of a model that `add_lora` or `load_adapter` wrapped.

    Args:
        weights: contents of a safetensors file.
        where: what to call the file in an error message.

    Raises:
        ModelFileError: `weights` is not safetensors, or has other names or shapes than the model's factors.
    """
    from peft import set_peft_model_state_dict

    try:
        state = load_tensors(weights)
    except SafetensorError as error:
        raise ModelFileError(f"{where}: not a whole safetensors file: {error}") from error
    _check_shapes(peft_model, _shapes(state), where=where)
    set_peft_model_state_dict(peft_model, state)


def _check_shapes(peft_model: "PeftModel", found: Mapping[str, list[int]], *, where: str) -> None:
    from peft import get_peft_model_state_dict

    shapes = _shapes(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    if found != shapes:
        name = min(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        raise ModelFileError(
            f"{where}: does not fit the model: {name} should have shape {shapes.get(name, 'none')}, "
            f"and has {found.get(name, 'none')}"
        )


def _lora_config(r: int, alpha: float, dropout: float, targets: Targets) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _wrap(model: "PreTrainedModel", config: Any, **how: bool) -> "PeftModel":
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), without_peft_warnings():
        try:
            return get_peft_model(model, config, **how)
        except ValueError as error:
            raise ConfigError(f"LoRA cannot be put on this model: {error}") from error


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Suppress two of PEFT's warnings: that it set fan_in_fan_out for a Conv1D, and its use of a deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _draw(parameter: torch.nn.Parameter, label: str) -> None:
    """Fill A (r, fan_in) uniformly within 1 / sqrt(fan_in), as `kaiming_uniform_(a=sqrt(5))`, in float32 on the CPU."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big")
    generator = torch.Generator().manual_seed(seed >> 1)
    bound = parameter.shape[1] ** -0.5
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


def _jsonable(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    return str(value)


@runtime_checkable
class RemotelyOptimized(Protocol):
    """An optimizer whose gradients and moments are on the worker."""

    def clip_grad_norm(self, largest: float) -> float:
        """Scale the gradients of the next step to a norm of at most `largest`; returns the norm before."""

    def fetch_state(self) -> None:
        """Copy the moments from the worker into `state`."""

    def store_state(self) -> None:
        """Copy the moments in `state` to the worker."""


def after_step(model: torch.nn.Module) -> None:
    """Let a protected model renew its secrets, if its profile has `rekey_every`. Does nothing on a plain model."""
    protection = getattr(model, "protection", None)
    if protection is not None:
        protection.after_step()


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> float:
    """Scale all gradients to a joint norm of at most `largest`; returns the norm before."""
    if isinstance(optimizer, RemotelyOptimized):
        return optimizer.clip_grad_norm(largest)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, largest).item()
