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
OWNER, PROVIDER = "default", "provider"
"""Names that the adapters have in a PEFT model. `provider_adapter.py` has the second."""
_LARGEST_CONFIG_BYTES = 2**20
_PROVIDER_DIGEST = "provider_sha256"
"""Attribute of a model that has a provider's adapter (`ProviderPeftModel`)."""
_TRAINED_ON = "provider_adapter_sha256"
"""Key in the metadata of the safetensors file: the digest of the provider's adapter that the factors stand on."""
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

    A model with a provider's adapter is wrapped already, and gets the factors on top of it.

    Each A has its own generator, seeded by (seed, parameter name): the factors depend neither on other random numbers
    nor on the order of the layers.

    Raises:
        ConfigError: a target names no layer, or one that cannot take LoRA.
    """
    check_targets(model, targets)
    peft_model = _wrap(model, _lora_config(r, alpha, dropout, targets))
    for name, parameter in peft_model.named_parameters():
        if f".lora_A.{OWNER}." in name:
            _draw(parameter, f"{seed}/{name}")
    return peft_model


def check_lora(skeleton: "PreTrainedModel", targets: Targets) -> None:
    """Check that `add_lora` will accept `targets`, on a model without weights (on the meta device), which is changed.

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
    config = read_adapter_config(directory)
    _refuse_other_provider(skeleton, directory)
    needs = [name for name in ("use_dora", "target_parameters") if getattr(config, name, None)]
    if needs and not weights_at_hand:
        raise ModelFileError(
            f"{directory / CONFIG}: {needs[0]}: such an adapter needs the weights themselves, and a protected model "
            "has them on the worker; use LoRA or rsLoRA on target_modules, or --plain"
        )
    wrapped = _wrap_as_saved(skeleton, config, directory, low_cpu_mem_usage=True)
    check_saved_shapes(wrapped, directory)


def check_saved_shapes(peft_model: "PeftModel", directory: Path, *, name: str = OWNER) -> None:
    """Check an adapter's file against the factors that a model has under that name; the factors are not read.

    Raises:
        ModelFileError: the file is not safetensors, or has other names or shapes.
    """
    weights = directory / WEIGHTS
    with _opened(weights) as file:
        found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    _check_shapes(peft_model, found, where=str(weights), name=name)


def load_adapter(model: "PreTrainedModel", directory: Path) -> "PeftModel":
    """Wrap a model in PEFT with the adapter of a directory, in evaluation mode.

    A model with a provider's adapter is wrapped already, and gets this one on top of it.

    Raises:
        ModelFileError: the directory has no adapter in safetensors, or the adapter is for another model, or was trained
            on top of another provider's adapter than the model has.
    """
    config = read_adapter_config(directory)
    _refuse_other_provider(model, directory)
    peft_model = _wrap_as_saved(model, config, directory)
    weights = directory / WEIGHTS
    set_adapter_weights(peft_model, weights.read_bytes(), where=str(weights))
    return peft_model.eval()


def read_adapter_config(directory: Path) -> Any:
    """The `LoraConfig` of an adapter's directory.

    Raises:
        ModelFileError: the directory has no LoRA adapter in safetensors.
    """
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


def _refuse_other_provider(model: torch.nn.Module, directory: Path) -> None:
    """Refuse an adapter that was trained on top of a provider's adapter where the model has another one, or none."""
    with _opened(directory / WEIGHTS) as file:
        _check_provider(model, file.metadata() or {}, str(directory))


def check_trained_on(model: torch.nn.Module, weights: bytes, where: str) -> None:
    """Refuse an adapter that was trained on top of a provider's adapter where the model has another one, or none.

    Args:
        weights: contents of a safetensors file.
        where: what to call the file in an error message.

    Raises:
        ModelFileError: the model has not the provider's adapter that the file names; or the file has no header.
    """
    try:
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise ModelFileError(f"{where}: not a whole safetensors file") from error
    _check_provider(model, metadata, where)


def _check_provider(model: torch.nn.Module, metadata: Mapping[str, str], where: str) -> None:
    wanted, found = metadata.get(_TRAINED_ON), getattr(model, _PROVIDER_DIGEST, None)
    if wanted is not None and wanted != found:
        has = "no provider's adapter" if found is None else f"another one, sha256 {found}"
        raise ModelFileError(
            f"{where}: was trained on top of the provider's adapter with sha256 {wanted}, and the model has {has}; "
            "give that one by --provider-adapter"
        )


@contextmanager
def _opened(weights: Path) -> Iterator[Any]:
    try:
        with safe_open(weights, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{weights}: not a whole safetensors file: {error}") from error


def adapter_files(peft_model: "PeftModel") -> dict[str, bytes]:
    """The owner's adapter in PEFT's format, as contents by file name. Equal factors give equal bytes.

    Nothing of a provider's adapter is in it but the digest, in the metadata of the safetensors file.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, adapter_name=OWNER, save_embedding_layers=False)
    config = peft_model.peft_config[OWNER].to_dict() | {"inference_mode": True}
    digest = getattr(peft_model, _PROVIDER_DIGEST, None)
    metadata = None if digest is None else {"format": "pt", _TRAINED_ON: digest}
    return {
        WEIGHTS: save_tensors({name: tensor.contiguous().cpu() for name, tensor in state.items()}, metadata),
        CONFIG: json.dumps(config, default=_jsonable, indent=2, sort_keys=True).encode(),
    }


def set_adapter_weights(peft_model: "PeftModel", weights: bytes, *, where: str, name: str = OWNER) -> None:
    """Set the factors of a model that `add_lora` or `load_adapter` wrapped.

    Args:
        weights: contents of a safetensors file.
        where: what to call the file in an error message.
        name: that the adapter has in the model.

    Raises:
        ModelFileError: `weights` is not safetensors, or has other names or shapes than the model's factors.
    """
    from peft import set_peft_model_state_dict

    try:
        state = load_tensors(weights)
    except SafetensorError as error:
        raise ModelFileError(f"{where}: not a whole safetensors file: {error}") from error
    _check_shapes(peft_model, _shapes(state), where=where, name=name)
    set_peft_model_state_dict(peft_model, state, adapter_name=name)


def _check_shapes(peft_model: "PeftModel", found: Mapping[str, list[int]], *, where: str, name: str) -> None:
    from peft import get_peft_model_state_dict

    shapes = _shapes(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))
    if found != shapes:
        key = min(key for key in {*shapes, *found} if shapes.get(key) != found.get(key))
        raise ModelFileError(
            f"{where}: does not fit the model: {key} should have shape {shapes.get(key, 'none')}, "
            f"and has {found.get(key, 'none')}"
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

    from obfuscatune.training.provider_adapter import ProviderPeftModel

    with torch.random.fork_rng(devices=[]), without_peft_warnings():
        try:
            if isinstance(model, ProviderPeftModel):
                config.base_model_name_or_path = model.get_base_model().__dict__.get("name_or_path")
                model.add_adapter(OWNER, config, **how)
                return model
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
