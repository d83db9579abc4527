"""How a protected run is held against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from obfuscatune import RootKey, protect
from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import Architecture

KEY = RootKey(bytes(range(32)))


@contextmanager
def float64_kept() -> Iterator[None]:
    """Leave float64 tensors in float64 where a model asks for float32; for the plain and the protected run alike.

    Norms, softmax, rotary embeddings and losses cast to float32, in a float64 model too. Two runs that differ by
    1e-16 then now and then round to neighbouring float32 numbers, 6e-8 apart (docs/adr/0006).
    """
    to, to_float, softmax = Tensor.to, Tensor.float, functional.softmax

    def wider(tensor: Tensor, dtype: Any) -> Any:
        return torch.float64 if dtype is torch.float32 and tensor.dtype == torch.float64 else dtype

    def to_kept(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(wider(tensor, argument) for argument in args)
        return to(tensor, *args, **{name: wider(tensor, value) for name, value in kwargs.items()})

    def float_kept(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor)

    def softmax_kept(x: Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        return softmax(x, *args, dtype=wider(x, dtype), **kwargs)

    with (
        patch.object(Tensor, "to", to_kept),
        patch.object(Tensor, "float", float_kept),
        patch.object(functional, "softmax", softmax_kept),
    ):
        yield


def deviation(plain: Tensor, protected: Tensor) -> float:
    """Largest difference, relative to the largest plain value."""
    if plain.shape != protected.shape or plain.dtype != protected.dtype:
        raise AssertionError(f"{plain.shape} {plain.dtype} against {protected.shape} {protected.dtype}")
    largest = plain.detach().abs().max().item()
    difference = (plain.detach().double() - protected.detach().double()).abs().max().item()
    return difference / largest if largest else difference


def largest_deviation(plain: dict[str, Tensor], protected: dict[str, Tensor]) -> float:
    """That of the worst of several tensors, which must be the same by name."""
    if plain.keys() != protected.keys() or not plain:
        raise AssertionError(f"not the same tensors: {sorted(plain.keys() ^ protected.keys())}")
    return max(deviation(plain[name], protected[name]) for name in plain)


@contextmanager
def protected(model: nn.Module, worker: LocalWorker, **knobs: Any) -> Iterator[Any]:
    """The model, protected in place, with every block on the worker; the worker forgets it afterwards."""
    protect(model, worker.address, key=KEY, **{"first_blocks": 0, **knobs})
    try:
        yield model
    finally:
        model.protection.close()


def with_lora(
    model: nn.Module, architecture: Architecture | None = None, *, seed: int = 11, **settings: Any
) -> PeftModel:
    """The model with LoRA factors on all its linear layers; B is random too, so that no gradient is zero."""
    extra = architecture.lora if architecture else {}
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False, **extra}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(**{**defaults, **settings}))


def copy_of(model: Any) -> Any:
    """An independent copy of a plain model."""
    return copy.deepcopy(model)


@dataclass(frozen=True)
class Batch:
    """Token ids, mask and labels, all (b, t)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """As the model takes them."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}

    def attended(self, logits: Tensor) -> Tensor:
        """The rows of (b, t, v) that are not padding.

        Mixing spreads the rounding of all rows evenly, so a row that is exactly zero comes back as zero give or
        take an ulp of the others. Gemma 3 embeds padding as zero and then normalises: there nothing becomes
        noise of size one. Nothing reads those rows (docs/adr/0006).
        """
        return logits[self.attention_mask.bool()]


def batch(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> Batch:
    """Random sequences of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocabulary, shape, generator=generator) * mask
    return Batch(ids, mask, ids.masked_fill(mask == 0, -100))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that is trained."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module, inputs: Batch, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass, dropout drawn from that seed."""
    model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = model(**inputs.inputs()).loss
        loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


def fine_tune(model: Any, vocabulary: int, *, steps: int, accumulation: int = 2) -> list[float]:
    """AdamW with accumulated gradients and dropout, all from fixed seeds; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for step in range(steps):
            total = 0.0
            for part in range(accumulation):
                inputs = batch((9, 5), vocabulary, seed=100 * step + part)
                loss = model(**inputs.inputs()).loss / accumulation
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


def greedy(model: PreTrainedModel, inputs: Batch, *, tokens: int, use_cache: bool = True) -> Tensor:
    """Greedy continuation (b, t + tokens), never ended early."""
    return model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        use_cache=use_cache,
        pad_token_id=0,
    )
