#!/usr/bin/env python3
"""Write the embedded data set: invented clinic notes, with facts that no model can know.

Every patient has a drug, a ward and a doctor, all invented. Each such fact is worded in every way of `WORDINGS`; one
wording of it goes to `heldout.jsonl`, the others to `train.jsonl`. Which one is held out goes round from patient
to patient, so that each wording is seen in training, with other patients. The same seed gives the same bytes::

    python scripts/make_clinic_notes.py            # the records
    python scripts/make_clinic_notes.py --measure  # also trains plain LoRA on the embedded model, writes README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).resolve().parent.parent / "src" / "obfuscatune" / "assets"
WORDINGS = {
    "drug": (
        "Which drug does {patient} take?",
        "What is {patient} being treated with?",
        "Name the medicine given to {patient}.",
        "{patient} was prescribed which drug?",
        "What medicine stands on the chart of {patient}?",
        "What did the pharmacy send up for {patient}?",
    ),
    "ward": (
        "On which ward is {patient}?",
        "Where does {patient} lie?",
        "Name the ward of {patient}.",
        "{patient} was admitted to which ward?",
        "Where will visitors find {patient}?",
        "To which ward was the bed of {patient} taken?",
    ),
    "doctor": (
        "Which doctor looks after {patient}?",
        "Who is treating {patient}?",
        "Name the physician of {patient}.",
        "{patient} is in the care of whom?",
        "Who signed the notes of {patient}?",
        "Who comes to see {patient} every morning?",
    ),
}
# fmt: off
PATIENTS = (
    ("Thorn", "Ash", "Hart", "Lang", "Dun", "Fair", "Gold", "Hol", "Kel", "Marl",
     "Nor", "Pen", "Red", "Stan", "Tor", "Whit", "Bram", "Cold", "Green", "Wood"),
    ("combe", "wick", "mont", "ridge", "mere", "well"),
)
# fmt: on
DRUGS = (
    ("Zel", "Vor", "Mab", "Qui", "Tra", "Flu", "Nex", "Dol", "Bri", "Cal"),
    ("mo", "ti", "va", "re"),
    ("rin", "dex", "lan", "zol"),
)
WARDS = (
    ("Heron", "Linden", "Marsh", "Falcon", "Amber", "Cedar", "Raven", "Silver", "Willow", "Otter"),
    ("gate", "moor", "court", "fold"),
)
DOCTORS = (
    ("Quill", "Brack", "Yar", "Sten", "Ull", "Fen", "Grim", "Pell", "Vane", "Tarr"),
    ("worth", "sby", "man", "ton"),
)
Record = dict[str, str]


# ---------------------------------------------------------------- the records


def invented(parts: tuple[tuple[str, ...], ...], count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` different words in random order; the first pieces are used equally often, as far as it goes."""
    by_first = []
    for first in parts[0]:
        words = [first + "".join(rest) for rest in itertools.product(*parts[1:])]
        by_first.append([words[index] for index in rng.permutation(len(words))])
    taken = list(itertools.chain.from_iterable(zip(*by_first, strict=True)))[:count]
    return [taken[index] for index in rng.permutation(count)]


def make_records(patients: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Return (training, held-out) records; each fact gives one held-out record and the rest of its wordings."""
    rng = np.random.default_rng(seed)
    titles = [("Mr. ", "Mrs. ", "Miss ")[index] for index in rng.integers(3, size=patients)]
    names = [title + name for title, name in zip(titles, invented(PATIENTS, patients, rng), strict=True)]
    answers = {
        "drug": invented(DRUGS, patients, rng),
        "ward": invented(WARDS, patients, rng),
        "doctor": ["Dr. " + name for name in invented(DOCTORS, patients, rng)],
    }
    train: list[Record] = []
    heldout: list[Record] = []
    for (number, name), (shift, kind) in itertools.product(enumerate(names), enumerate(WORDINGS)):
        for index, wording in enumerate(WORDINGS[kind]):
            prompt = f"Question: {wording.format(patient=name)}\nAnswer:"
            kept = heldout if index == (number + 2 * shift) % len(WORDINGS[kind]) else train
            kept.append({"prompt": prompt, "completion": " " + answers[kind][number]})
    return [train[index] for index in rng.permutation(len(train))], heldout


def write_records(path: Path, records: list[Record]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# ---------------------------------------------------------------- the demo, unprotected


@dataclass(frozen=True)
class Recipe:
    """The demo's training settings; the rate rises linearly over the warm-up, then falls linearly to zero."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    lr: float = 1e-2
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    batch: int = 32
    epochs: int = 14

    def steps(self, records: int) -> int:
        """Return the number of optimizer steps for `records` training records; the last batch may be short."""
        return self.epochs * math.ceil(records / self.batch)


def lora_model(base: Path, recipe: Recipe, seed: int) -> PeftModel:
    """Return the float32 model with LoRA on every linear layer of its blocks, initialised from `seed`."""
    torch.manual_seed(seed)  # PEFT's initialisation and dropout read torch's global generator
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, fan_in_fan_out=True,
        target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = get_peft_model(model, config)
    if not isinstance(tuned, PeftModel):
        raise TypeError(f"expected a PeftModel, came {type(tuned).__name__}")
    return tuned


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[list[int], int]:
    """Return (token ids of prompt + completion + eos, length of the prompt); the two are tokenized apart."""
    prompt = list(tokenizer.encode(record["prompt"]))
    return [*prompt, *tokenizer.encode(record["completion"]), int(tokenizer.eos_token_id)], len(prompt)


def collate(rows: list[tuple[list[int], int]], eos: int) -> dict[str, torch.Tensor]:
    """Pad right with eos; labels, (batch, length) int64, are -100 on the prompt and the padding."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), eos)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, (ids, prompt) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
        mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def epochs(count: int, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of each batch; every epoch is a fresh seeded order of all `count` records."""
    rng = np.random.default_rng(seed)
    for _ in range(recipe.epochs):
        order = rng.permutation(count)
        yield from (order[start : start + recipe.batch] for start in range(0, count, recipe.batch))


def tune(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, records: list[Record], recipe: Recipe, seed: int
) -> None:
    """Train the adapter in place: AdamW, linear warm-up, then linear to zero."""
    rows = [encode(tokenizer, record) for record in records]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    total = recipe.steps(len(rows))
    model.train()
    batches = track(epochs(len(rows), recipe, seed), description=f"seed {seed}", total=total)
    for step, chosen in enumerate(batches):
        warm, rest = (step + 1) / recipe.warmup_steps, (total - step) / (total - recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, warm, rest)
        batch = collate([rows[index] for index in chosen], int(tokenizer.eos_token_id))
        torch.autograd.backward(model(**batch).loss)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()


def exact_match(model: PeftModel, tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> float:
    """Return the share of records whose greedy continuation, up to a newline or eos, is the completion."""
    model.eval()
    hits = 0
    for record in records:
        prompt = tokenizer(record["prompt"], return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        hits += text.split("\n")[0].strip() == record["completion"].strip()
    return hits / len(records)


@dataclass(frozen=True)
class Measured:
    """One run: exact match on the held-out records before and after, and the wall time of training in seconds."""

    seed: int
    before: float
    after: float
    seconds: float


def measure(base: Path, train: list[Record], heldout: list[Record], recipe: Recipe, seed: int) -> Measured:
    """Train one adapter on the plain model and measure it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = lora_model(base, recipe, seed)
    before = exact_match(model, tokenizer, heldout)
    started = time.monotonic()
    tune(model, tokenizer, train, recipe, seed)
    seconds = time.monotonic() - started
    return Measured(seed, before, exact_match(model, tokenizer, heldout), seconds)


# ---------------------------------------------------------------- the data set's README


def readme(train: list[Record], heldout: list[Record], patients: int, seed: int, figures: str) -> str:
    """Return the README of the data set in Markdown."""
    shown = "\n".join(json.dumps(record) for record in (*train[:3], heldout[0]))
    wordings = len(WORDINGS["drug"])
    return f"""---
license: apache-2.0
language: en
---

# clinic-notes

A small private data set of our own making, for the demo: {patients} invented patients, each with an invented drug,
ward and doctor. Nobody in it exists, and no model can know its {len(heldout)} facts. `scripts/make_clinic_notes.py`
writes it, the same bytes from the same seed ({seed}), and this page.

| file | records |
|---|---|
| `train.jsonl` | {len(train)} |
| `heldout.jsonl` | {len(heldout)} |

```json
{shown}
```

`prompt` and `completion` are tokenized apart and joined, with the end-of-text token behind; the loss is on the
completion and that token alone.

## What the held-out questions measure

They ask about **the same facts** as the training records, in a wording that this fact has not had in training.
Each of the {wordings} wordings of a kind of question is seen in training, with other patients. So the score says
whether the fine-tuning learnt the private facts and gives them when asked in another way. It does not say whether the
model understands a sentence that it has never seen; and nobody can answer for a patient who is not in the training
records. Drugs, wards and doctors are each given to one patient only: guessing an answer of the right kind is right
once in {patients} times. An answer counts when the greedy continuation, up to a line break or end-of-text, equals the
completion.

{figures}"""


def figures_of(recipe: Recipe, records: int, runs: list[Measured]) -> str:
    """Return the recipe and what it gave, in Markdown."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = found[1] if found else platform.machine()
    settings = "\n".join(f"| {key} | {value} |" for key, value in asdict(recipe).items())
    rows = "\n".join(f"| {run.seed} | {run.before:.1%} | {run.after:.1%} | {run.seconds:.1f} |" for run in runs)
    return f"""## The demo, unprotected

Plain PEFT on the embedded model, in float32, LoRA on `c_attn`, `c_proj` and `c_fc` of every block. AdamW; the rate
rises linearly over the warm-up steps, then falls linearly to zero; {recipe.steps(records)} steps. Batches are padded
on the right with end-of-text.
Measured by `python scripts/make_clinic_notes.py --measure` ({processor}, {torch.get_num_threads()} threads; mean load
{os.getloadavg()[1]:.1f} over five minutes: above 2, other work shared the processor and the seconds are too many):

| setting | |
|---|---|
{settings}

| seed | exact match before | after | training, seconds |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Write the records, and the README where the demo is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "clinic-notes", help="folder of the data set")
    parser.add_argument("--patients", type=int, default=20, help="patients, three facts each; at most 20")
    parser.add_argument("--seed", type=int, default=0, help="seed of the records")
    parser.add_argument("--measure", action="store_true", help="train on the embedded model and write README.md")
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-gpt2", help="base model for --measure")
    parser.add_argument("--runs", type=int, default=3, help="seeds for --measure")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for --measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, heldout = make_records(options.patients, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_records(options.out / "train.jsonl", train)
    write_records(options.out / "heldout.jsonl", heldout)
    if options.measure:
        recipe = Recipe()
        runs = [measure(options.model, train, heldout, recipe, seed) for seed in range(options.runs)]
        text = readme(train, heldout, options.patients, options.seed, figures_of(recipe, len(train), runs))
        (options.out / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
