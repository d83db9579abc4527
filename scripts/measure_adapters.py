"""How far LoRA on the worker goes from plain PEFT: SGD and AdamW, in the paper's basis, on the embedded model.

    python scripts/measure_adapters.py --steps 100

Each row fine-tunes the embedded model twice from the same start on the same batches, plain and with the factors on the
worker, without dropout, and prints as Markdown the largest difference of any factor over the largest factor, and of any
step's loss; and the loss over the last tenth of the steps. `private` keeps LoRA in the enclave, for comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune import local_worker, protect, settle_process
from obfuscatune.assets import clinic_notes_path, tiny_model_path
from obfuscatune.training.adapter import add_lora

RATE = {"sgd": 0.05, "adamw": 1e-3}
BATCH = 4
TOKENS = 48


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Texts of the embedded data set, cut to one length."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    lines = (clinic_notes_path() / "train.jsonl").read_text("utf-8").splitlines()
    text = "\n".join(" ".join(str(value) for value in json.loads(line).values()) for line in lines)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: ids.numel() // TOKENS * TOKENS].view(-1, TOKENS)
    chosen = [rows[torch.arange(step * BATCH, (step + 1) * BATCH) % rows.shape[0]] for step in range(steps)]
    return [{"input_ids": it, "labels": it} for it in chosen]


def train(model: Any, optimizer: Any, data: list[dict[str, torch.Tensor]]) -> list[float]:
    """The loss of every step. In evaluation mode: no dropout anywhere."""
    losses = []
    for inputs in data:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(method: str, profile: str | None, dtype: torch.dtype, data: list[Any], address: str) -> tuple[list[float], Any]:
    """Losses, and the factors by name."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=dtype).eval()
    if profile is not None:
        model = protect(model, address, profile, base="closed")
    adapted = add_lora(model, r=8, alpha=16, dropout=0.0, targets="all-linear", seed=0)
    if profile is not None and model.protection.lora_on_worker:
        optimizer: Any = model.protection.move_adapter(adapted).optimizer(method, lr=RATE[method])
    else:
        kind = torch.optim.SGD if method == "sgd" else torch.optim.AdamW
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = kind(trained, lr=RATE[method], weight_decay=0.0)
    losses = train(adapted, optimizer, data)
    factors = {name: value.double() for name, value in adapted.state_dict().items() if "lora_" in name}
    if profile is not None:
        model.protection.close()
    return losses, factors


def main() -> None:
    """Print the table."""
    settle_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    data = batches(parser.parse_args().steps)
    tail = max(1, len(data) // 10)
    columns = ("optimizer", "dtype", "profile", "factors", "losses", "last loss, plain", "last loss")
    sys.stdout.write(f"|{'|'.join(columns)}|\n|{'---|' * len(columns)}\n")
    with local_worker() as worker:
        for method in RATE:
            for dtype in (torch.float64, torch.float32):
                expected, reference = run(method, None, dtype, data, worker.address)
                for profile in ("paper", "private"):
                    found, factors = run(method, profile, dtype, data, worker.address)
                    largest = max(value.abs().max() for value in reference.values())
                    apart = max((factors[name] - value).abs().max() for name, value in reference.items()) / largest
                    losses = max(abs(a - b) for a, b in zip(expected, found, strict=True))
                    means = (sum(it[-tail:]) / tail for it in (expected, found))
                    last = "|".join(f"{mean:.4f}" for mean in means)
                    kind = str(dtype).removeprefix("torch.")
                    sys.stdout.write(f"|{method}|{kind}|{profile}|{apart:.0e}|{losses:.0e}|{last}|\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
