"""The work that is timed: one LoRA step, the same for every contender."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SEED = 0


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of that shape with random float32 weights, the same for every process."""
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


class LoraStep:
    """Forward, backward and AdamW on one fixed random batch, as plain PEFT does them."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        torch.manual_seed(SEED)
        lora = LoraConfig(**LORA, fan_in_fan_out=model.config.model_type == "gpt2")  # GPT-2's Conv1D is (in, out)
        self._model = get_peft_model(model, lora).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)
        vocabulary = model.config.get_text_config().vocab_size
        self._ids = torch.randint(vocabulary, (batch, length))

    def __call__(self) -> float:
        """One step; returns the loss in nats."""
        loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
