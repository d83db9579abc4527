"""Tokens per second of the service's engine, for one client and for several that ask at the same time.

    python scripts/measure_engine.py                        # the embedded model, protected by `private`
    python scripts/measure_engine.py --shape gpt2 --plain   # random weights in GPT-2 small's shape

Each client asks for one answer after another; all prompts and answers have the same lengths. Workers run on this
machine.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from obfuscatune import local_worker, protect
from obfuscatune.assets import tiny_model_path
from obfuscatune.service.engine import Engine, EngineLimits
from obfuscatune.service.requests import FinishEvent, Request
from obfuscatune.service.sampling import SamplingParams


def model_of(shape: str) -> Any:
    """The embedded model, or random weights in GPT-2 small's shape, in float32."""
    if shape == "tiny":
        return AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(), dtype=torch.float32).eval()


def tokens_per_second(engine: Engine, clients: int, answers: int, prompt: int, tokens: int) -> float:
    """Of all clients together."""

    def ask(client: int) -> None:
        for answer in range(answers):
            ids = tuple(3 + (31 * client + 17 * answer + 7 * place) % 300 for place in range(prompt))
            bias = dict.fromkeys(engine.ends, -100.0)  # answers of one length
            events = list(engine.submit(Request(ids, tokens, SamplingParams(seed=client, logit_bias=bias))))
            if not (isinstance(events[-1], FinishEvent) and events[-1].completion_tokens == tokens):
                raise SystemExit(f"expected {tokens} tokens, found {events[-1]}")

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * answers * tokens / (time.perf_counter() - began)


def main() -> None:
    """Measure, and print a line for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "gpt2"), default="tiny")
    parser.add_argument("--profile", default="private")
    parser.add_argument("--plain", action="store_true", help="without protection")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--answers", type=int, default=3, help="of each client")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    options = parser.parse_args()
    model = model_of(options.shape)
    if not options.plain:
        with local_worker() as worker, local_worker() as mask_worker:
            masks: Any = {"mask_worker": mask_worker.address} if options.profile == "guarded" else {}
            with protect(model, worker.address, options.profile, base="closed", **masks):
                measure(model, options)
    else:
        measure(model, options)


def measure(model: Any, options: argparse.Namespace) -> None:
    """Print tokens per second, and how much more that is than with the first number of clients."""
    with Engine(model, AutoTokenizer.from_pretrained(tiny_model_path()), EngineLimits(batch=16)) as engine:
        tokens_per_second(engine, max(options.clients), 1, options.prompt, 4)  # warms up
        first = 0.0
        for clients in options.clients:
            rate = tokens_per_second(engine, clients, options.answers, options.prompt, options.tokens)
            first = first or rate
            print(f"{clients:3} clients: {rate:7.1f} tokens/s, {rate / first:.2f}x")
        print(engine.stats())


if __name__ == "__main__":
    main()
