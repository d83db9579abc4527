"""The architectures of the contract, as data: each a tiny random configuration, or a directory with real weights.

Sizes are odd where an architecture allows it, so that no transform finds a convenient grid. Weights
are drawn ten times larger than Hugging Face draws them: with its 0.02 a tiny model adds next to nothing to its
residual stream, and a wrong layer would hardly show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

SHARED = Path(__file__).parents[3] / "shared"

VOCABULARY = 97
_SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "initializer_range": 0.2, "max_position_embeddings": 96}
_GPT2 = {"n_positions": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Architecture:
    """One row of the contract.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        settings: of its configuration.
        auto_class: which head it gets.
        crossings: requests that one block costs in a forward pass.
        lora: what PEFT must be told about it.
        directory: where its real weights are, for a model that is not random.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    auto_class: Any = AutoModelForCausalLM
    crossings: int = 4
    lora: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def is_causal(self) -> bool:
        """Whether it generates."""
        return self.auto_class is AutoModelForCausalLM

    def build(self, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
        """The plain model in evaluation mode; the same weights each time."""
        if self.directory is not None:
            return self.auto_class.from_pretrained(self.directory, dtype=dtype, **settings)
        config = AutoConfig.for_model(self.model_type, **{**_SMALL, **self.settings, **settings})
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = self.auto_class.from_config(config, dtype=torch.float64)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # biases and norms, which start as 0 and 1
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.to(dtype).eval()


ARCHITECTURES = {
    "gpt2": Architecture(
        "gpt2", {**_GPT2, "n_inner": 67, "scale_attn_by_inverse_layer_idx": True}, lora={"fan_in_fan_out": True}
    ),
    "llama": Architecture(
        "llama",
        {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "llama-biased": Architecture(
        "llama",
        {"hidden_size": 54, "intermediate_size": 71, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2": Architecture(
        "qwen2",
        {"hidden_size": 40, "intermediate_size": 53, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"tie_word_embeddings": True},
    ),
    "qwen3": Architecture(
        "qwen3",
        {
            "hidden_size": 52,
            "intermediate_size": 73,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 14,
        },
    ),
    "mistral": Architecture(
        "mistral",
        {"hidden_size": 48, "intermediate_size": 59, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"sliding_window": 7},
    ),
    "gemma2": Architecture(
        "gemma2",
        {"hidden_size": 44, "intermediate_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
        | {"sliding_window": 7, "query_pre_attn_scalar": 10},
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {"hidden_size": 52, "intermediate_size": 83, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12}
        | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": Architecture(
        "phi",
        {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 4, "partial_rotary_factor": 0.5},
    ),
    "opt": Architecture(
        "opt",
        {"hidden_size": 48, "ffn_dim": 67, "num_attention_heads": 4, "word_embed_proj_dim": 31, "init_std": 0.2}
        | {"do_layer_norm_before": True},
    ),
    "gpt_neox": Architecture(
        "gpt_neox",
        {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 4, "rotary_pct": 0.5},
    ),
    "bert": Architecture(
        "bert",
        {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 4},
        auto_class=AutoModelForMaskedLM,
    ),
    "stories260K": Architecture("llama", directory=SHARED / "models" / "stories260K"),
}
