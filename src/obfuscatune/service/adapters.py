"""Fine-tuned models by name: LoRA adapters on one base model, of which few are in memory at a time.

    name  ->  in memory already?  ->  else its files, from the service  ->  PEFT layers under the base's own
                                      and the one used longest ago leaves

PEFT knows adapters by names of ours: what clients call theirs is not passed on to it.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from obfuscatune.errors import ConfigError, ModelFileError
from obfuscatune.training.adapter import (
    CONFIG,
    PROVIDER,
    WEIGHTS,
    check_trained_on,
    set_adapter_weights,
    without_peft_warnings,
)
from obfuscatune.training.provider_adapter import ProviderPeftModel, refuse_unless_additive

AdapterSource = Callable[[str], Mapping[str, bytes]]
"""The files of the adapter of this name in PEFT's format, as `training.adapter.adapter_files` gives them. An error that
it raises fails the requests for the adapter."""
LARGEST_RANK = 4096


class Adapters:
    """The adapters on one model. Used by one thread."""

    def __init__(self, model: PreTrainedModel | PeftModel, source: AdapterSource | None, limit: int) -> None:
        """
        Args:
            model: as `Engine` takes it.
            source: has the files of adapters; None where there are none.
            limit: adapters in memory at a time, the provider's apart.

        Raises:
            ConfigError: the model has adapters of somebody else's than the provider.
        """
        if isinstance(model, PeftModel) and not isinstance(model, ProviderPeftModel):
            raise ConfigError("the engine takes adapters by name: give it the base model, not one with an adapter")
        self._peft: Any = model if isinstance(model, PeftModel) else None
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        """The model of transformers, which PEFT's layers are part of."""
        self._source = source
        self._limit = limit
        self._loaded: OrderedDict[str, str] = OrderedDict()
        """PEFT's name of each adapter by ours, the one used longest ago first."""
        self._active: str | None = None
        self._layers: list[BaseTunerLayer] = []
        self._numbers = itertools.count()
        self._rest()

    def __len__(self) -> int:
        return len(self._loaded)

    def has_room(self, name: str | None, used: Collection[str | None]) -> bool:
        """Whether an adapter can be loaded while those in `used` stay."""
        return name is None or name in self._loaded or len(self._loaded) < self._limit or self._idle(used) is not None

    def _idle(self, used: Collection[str | None]) -> str | None:
        return next((name for name in self._loaded if name not in used), None)

    def load(self, name: str | None, used: Collection[str | None]) -> None:
        """Have an adapter in memory; `has_room` must have said that it can be. None is the base model.

        Raises:
            ModelFileError: its files are not a LoRA adapter for this model, on top of this provider's adapter.
            ConfigError: it is of a kind that does not add up with another one; or there are no adapters here.
        """
        if name is None:
            return
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return
        if self._source is None:
            raise ConfigError("this engine has no adapters")
        files = self._source(name)
        idle = self._idle(used)
        if len(self._loaded) >= self._limit and idle is not None:
            self.unload(idle)
        inner = f"adapter{next(self._numbers)}"
        try:
            self._add(inner, files)
        except BaseException:
            self._remove(inner)
            raise
        self._loaded[name] = inner

    def unload(self, name: str) -> None:
        """Forget an adapter, if it is in memory. No sequence may use it."""
        inner = self._loaded.pop(name, None)
        if inner is not None:
            self._remove(inner)

    def use(self, name: str | None) -> None:
        """Have the next forward passes be of this adapter, or of the base model: what the provider gave."""
        if name == self._active:
            return
        self._activate(None if name is None else self._loaded[name])
        self._active = name

    def _activate(self, inner: str | None) -> None:
        """Layer by layer: PEFT's own switch walks over all modules, which takes longer than a token."""
        names = ([] if inner is None else [inner]) + ([PROVIDER] if isinstance(self._peft, ProviderPeftModel) else [])
        for layer in self._layers:
            layer.set_adapter(names, inference_mode=True)

    def _add(self, inner: str, files: Mapping[str, bytes]) -> None:
        config = _config(files)
        check_trained_on(self.base if self._peft is None else self._peft, files[WEIGHTS], WEIGHTS)
        with torch.random.fork_rng(devices=[]), without_peft_warnings():
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.base, config, adapter_name=inner)
                else:
                    self._peft.add_adapter(inner, config)
            except ValueError as error:
                raise ModelFileError(f"an adapter does not fit the model: {error}") from error
        set_adapter_weights(self._peft, files[WEIGHTS], where=WEIGHTS, name=inner)
        self._peft.eval()
        self._rest()

    def _rest(self) -> None:
        """The base model, whatever PEFT made active; with the layers that there are now."""
        self._layers = [module for module in self.base.modules() if isinstance(module, BaseTunerLayer)]
        self._activate(None)
        self._active = None

    def _remove(self, inner: str) -> None:
        """Take an adapter out of the layers. With the last one, the plain layers are put back."""
        if self._peft is None or inner not in self._peft.peft_config:
            return
        self._rest()  # PEFT warns where an active one is deleted
        if len(self._peft.peft_config) > 1:
            self._peft.delete_adapter(inner)
        else:
            self.base, self._peft = self._peft.unload(), None
        self._rest()


def _config(files: Mapping[str, bytes]) -> Any:
    """The `LoraConfig` among an adapter's files.

    Raises:
        ModelFileError: there is none, or no weights.
        ConfigError: it is of a kind that does not add up with another one.
    """
    if not {CONFIG, WEIGHTS} <= files.keys():
        raise ModelFileError(f"not an adapter: expected {CONFIG} and {WEIGHTS}")
    try:
        settings = json.loads(files[CONFIG])
        if not isinstance(settings, dict) or settings.pop("peft_type", None) != PeftType.LORA.value:
            raise ModelFileError(f"{CONFIG}: expected a LoRA adapter")
        config = LoraConfig.from_peft_type(**settings)
        ranks = [config.r, *config.rank_pattern.values()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{CONFIG}: not an adapter's configuration: {error}") from error
    if not all(isinstance(rank, int) and 0 < rank <= LARGEST_RANK for rank in ranks):
        raise ModelFileError(f"{CONFIG}: expected ranks from 1 to {LARGEST_RANK}")
    refuse_unless_additive(config, CONFIG)
    config.inference_mode = True
    return config
