"""A provider's LoRA adapter under the owner's: y = x W + provider's delta + owner's delta.

The provider's adapter is frozen and always active, and it never leaves the enclave. The owner's adapter is trained on
top of it and is saved without it. Both are adapters of one `PeftModel`, so the sum is PEFT's own.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModelForCausalLM

from obfuscatune.errors import ConfigError, ModelFileError
from obfuscatune.training.adapter import (
    CONFIG,
    PROVIDER,
    WEIGHTS,
    check_saved_shapes,
    read_adapter_config,
    set_adapter_weights,
    without_peft_warnings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE_ADAPTER_ONLY = (
    *("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings of `LoraConfig` under which two adapters do not add up, or change the layers that both stand on."""

_INITIALIZATIONS = ("gaussian", "orthogonal", "eva")
"""Those by name that leave the base weights as they are."""


class ProviderPeftModel(PeftModelForCausalLM):  # type: ignore[misc]  # peft leaves it untyped
    """A PEFT model whose adapter `provider` is frozen, always active, and saved only where it is named.

    The owner's adapters stand on top of it, one active at a time: `add_adapter`, `set_adapter`, `load_adapter`,
    `save_pretrained` and `Trainer` work on these. `disable_adapter` switches off the owner's alone.
    """

    provider_sha256: str
    """`adapter_digest` of the provider's adapter."""

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter of the owner's, and activate it if it is the first.

        Raises:
            ConfigError: it is of a kind that does not add up with another adapter.
        """
        refuse_unless_additive(peft_config, adapter_name)
        active = self._owner_adapter() or adapter_name
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)  # makes all active adapters trainable
        self.set_adapter(active, inference_mode=bool(peft_config.inference_mode))

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate one of the owner's adapters beside the provider's, which stays frozen.

        `provider` activates the provider's alone.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.active_adapter = adapter_name
        # The owner's comes first: Trainer loads its checkpoints into the first one.
        both = [adapter_name, PROVIDER] if adapter_name != PROVIDER else [PROVIDER]
        self.base_model.set_adapter(both, inference_mode=inference_mode)
        self.base_model.set_requires_grad(PROVIDER, False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch off the owner's adapter while the `with` lasts; the provider's stays on."""
        active = self._owner_adapter() or PROVIDER
        inference_mode = not any(parameter.requires_grad for parameter in self.parameters())
        self.set_adapter(PROVIDER)
        try:
            yield
        finally:
            self.set_adapter(active, inference_mode=inference_mode)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, but None for `selected_adapters` is the owner's adapters: the provider's must be named.

        Raises:
            ConfigError: there is no adapter of the owner's.
        """
        chosen = (
            [name for name in self.peft_config if name != PROVIDER] if selected_adapters is None else selected_adapters
        )
        if not chosen:
            raise ConfigError(
                "there is no adapter of the owner's to save: add one with model.add_adapter; "
                f"selected_adapters=[{PROVIDER!r}] would save the provider's"
            )
        super().save_pretrained(save_directory, safe_serialization, chosen, **kwargs)

    def _owner_adapter(self) -> str | None:
        """The active adapter of the owner's."""
        return next((name for name in self.base_model.active_adapters if name != PROVIDER), None)


def load_provider_adapter(model: "PreTrainedModel", directory: Path | str) -> ProviderPeftModel:
    """Put a provider's LoRA adapter under the adapters that the owner will add, frozen and in evaluation mode.

    Args:
        model: a Hugging Face causal LM, protected or plain; it is wrapped in place.
        directory: the provider's adapter in PEFT's format: LoRA or rsLoRA factors of linear layers, with rank and alpha
            patterns where wanted.

    Raises:
        ConfigError: the model's profile trains LoRA on the worker; or the adapter is of a kind that does not add up
            with another one (DoRA, modules_to_save, biases, ...).
        ModelFileError: the directory has no adapter in safetensors, or the adapter is for another model.

    Example:
        >>> model = obfuscatune.load("my-model", profile="guarded", ...)
        >>> model = obfuscatune.load_provider_adapter(model, "provider-adapter")
        >>> model.add_adapter("default", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        >>> Trainer(model, ...).train()
        >>> model.save_pretrained("owner-adapter")  # the owner's alone
    """
    directory = Path(directory)
    protection = getattr(model, "protection", None)
    refuse_lora_on_worker(protection is not None and protection.lora_on_worker)
    wrapped = _wrapped(model, directory)
    weights = directory / WEIGHTS
    content = weights.read_bytes()
    set_adapter_weights(wrapped, content, where=str(weights), name=PROVIDER)
    wrapped.provider_sha256 = _digest((directory / CONFIG).read_bytes(), content)
    wrapped.eval()
    return wrapped


def check_provider_adapter(skeleton: "PreTrainedModel", directory: Path, *, lora_on_worker: bool) -> ProviderPeftModel:
    """Check that `load_provider_adapter` will accept an adapter, on a model without weights (on the meta device).

    Args:
        lora_on_worker: whether the profile trains LoRA on the worker.

    Returns:
        The skeleton with the adapter on it, to check the owner's adapter against.

    Raises:
        ConfigError, ModelFileError: as `load_provider_adapter`.
    """
    refuse_lora_on_worker(lora_on_worker)
    wrapped = _wrapped(skeleton, directory, low_cpu_mem_usage=True)
    check_saved_shapes(wrapped, directory, name=PROVIDER)
    wrapped.provider_sha256 = adapter_digest(directory)
    return wrapped


def adapter_digest(directory: Path) -> str:
    """SHA-256 of an adapter's files, in hexadecimal: `cat adapter_config.json adapter_model.safetensors | sha256sum`.

    Raises:
        ModelFileError: the directory has no adapter in safetensors.
    """
    read_adapter_config(directory)
    return _digest((directory / CONFIG).read_bytes(), (directory / WEIGHTS).read_bytes())


def provider_summary(model: Any) -> dict[str, Any] | None:
    """Digest and number of parameters of the provider's adapter under a model; None where there is none."""
    if not isinstance(model, ProviderPeftModel):
        return None
    count = sum(p.numel() for name, p in model.named_parameters() if PROVIDER in name.split("."))
    return {"sha256": model.provider_sha256, "parameters": count}


def refuse_lora_on_worker(lora_on_worker: bool) -> None:
    """Refuse a profile that would put the provider's factors on the worker.

    Raises:
        ConfigError: `lora_on_worker` is true.
    """
    if lora_on_worker:
        raise ConfigError(
            "--provider-adapter: a profile with LoRA on the worker (paper) would show the worker the provider's "
            "adapter; take --profile private or guarded"
        )


def refuse_unless_additive(config: Any, name: str) -> None:
    """Refuse an adapter that is not a sum of low-rank products beside those of another adapter.

    Raises:
        ConfigError: it is not LoRA, or a setting of it is for one adapter alone.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"adapter {name}: with a provider's adapter under it, it must be LoRA, not {config.peft_type}"
        )
    given = [setting for setting in _ONE_ADAPTER_ONLY if getattr(config, setting, None)]
    if config.bias != "none":
        given.append(f"bias={config.bias}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _INITIALIZATIONS:
        given.append(f"init_lora_weights={config.init_lora_weights}")
    if given:
        raise ConfigError(
            f"adapter {name}: {given[0]} does not add up with another adapter; a provider's adapter, and one on top of "
            "it, can be LoRA or rsLoRA on target_modules"
        )


def _wrapped(model: "PreTrainedModel", directory: Path, **how: bool) -> ProviderPeftModel:
    config = read_adapter_config(directory)
    refuse_unless_additive(config, str(directory))
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(f"a provider's adapter goes under a causal language model, not a {type(model).__name__}")
    config.inference_mode = True
    with torch.random.fork_rng(devices=[]), without_peft_warnings():
        try:
            return ProviderPeftModel(model, config, PROVIDER, **how)
        except ValueError as error:
            raise ModelFileError(f"{directory}: this adapter does not fit the model: {error}") from error


def _digest(config: bytes, weights: bytes) -> str:
    return hashlib.sha256(config + weights).hexdigest()
