"""What an engine answers, and what `generate` would."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.assets import tiny_model_path
from obfuscatune.service.engine import Engine, EngineLimits
from obfuscatune.service.requests import Event, FinishEvent, Handle, Request, TokenEvent
from obfuscatune.service.sampling import SamplingParams
from obfuscatune.training.adapter import adapter_files, add_lora

GREEDY = SamplingParams(temperature=0)
ENDLESS = 2**62
"""Stands for the end of sequence where none is to come."""


def tiny_tokenizer() -> Any:
    """That of the embedded model."""
    return AutoTokenizer.from_pretrained(tiny_model_path())


def tiny_model() -> Any:
    """The embedded model, plain, in float32."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32).eval()


def with_random_lora(model: Any, seed: int) -> Any:
    """The model with an adapter that changes what it says."""
    adapted = add_lora(model, r=4, alpha=8, dropout=0.1, targets="all-linear", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B.default." in name:  # not the provider's
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def files_of(adapted: Any) -> dict[str, bytes]:
    """The adapter of such a model, as an engine reads it."""
    return adapter_files(adapted)


@contextmanager
def engine_of(
    model: Any, *, ends: bool = False, source: Callable[[str], dict[str, bytes]] | None = None, **limits: int
) -> Iterator[Engine]:
    """An engine with the embedded model's tokenizer, whatever the model. With `ends` its own tokens end an answer."""
    with Engine(model, tiny_tokenizer(), replace(EngineLimits(batch=6, prefill_tokens=16), **limits), source) as engine:
        if not ends:
            engine.ends = frozenset()
        yield engine


def tokens(events: list[Event]) -> list[int]:
    """Of an answer."""
    return [event.token for event in events if isinstance(event, TokenEvent)]


def text(events: list[Event]) -> str:
    """Of an answer."""
    return "".join(event.text for event in events if isinstance(event, TokenEvent | FinishEvent))


def generated(model: Any, request: Request) -> list[int]:
    """The tokens that `generate` draws with the request's seed, as `obfuscatune generate` calls it."""
    sampling, ids = request.sampling, torch.tensor([request.prompt])
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed or 0)
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_tokens,
            pad_token_id=0,
            eos_token_id=ENDLESS,
            **how,
        )
    return whole[0, len(request.prompt) :].tolist()


def some_requests(seed: int, count: int, vocabulary: int, names: tuple[str | None, ...] = (None,)) -> list[Request]:
    """Requests of all lengths, greedy and drawn."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 30))),
            rng.randrange(1, 24),
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
                top_p=rng.choice([1.0, 0.9, 0.5]),
                seed=rng.getrandbits(40),
            ),
            adapter=rng.choice(names),
        )
        for _ in range(count)
    ]


def answered_while_joining(engine: Engine, requests: list[Request], seed: int) -> list[list[int]]:
    """Tokens of each request. They are submitted at random moments of the others' answers: after so many tokens."""
    rng = random.Random(seed)
    found: list[list[int]] = [[] for _ in requests]
    waiting = list(enumerate(requests))
    lock = threading.Lock()
    readers: list[threading.Thread] = []

    def submit_next() -> None:
        with lock:
            if not waiting:
                return
            place, request = waiting.pop(0)
            reader = threading.Thread(target=read, args=(place, engine.submit(request), rng.randrange(0, 8)))
            readers.append(reader)
        reader.start()

    def read(place: int, handle: Handle, joined_after: int) -> None:
        for count, event in enumerate(handle):
            if isinstance(event, TokenEvent):
                found[place].append(event.token)
            if count == joined_after:
                submit_next()
        submit_next()  # this one was too short for anybody to join it

    submit_next()
    submit_next()
    while readers:
        readers.pop(0).join()
        if not readers and waiting:
            submit_next()
    return found
