"""A model in its plain form, for the runs that protection is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obfuscatune.wire.errors import ModelFileError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def load_plain(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model as it is, all of it in this process. `config`: of the directory, as `read_config` gives it.

    Raises:
        ModelFileError: the directory cannot be read as a model in safetensors.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelFileError(f"{directory} cannot be read as a model in safetensors: {error}") from error
    return model
