"""A model, question sets and cells so small that a whole reproduction takes seconds."""

import json
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from obfuscatune.assets import tiny_model_path
from obfuscatune.reproduction.cells import Measured
from obfuscatune.reproduction.presets import PRESETS, Preset, ShapeDepth

_WORDS = ("red", "blue", "green", "grey")


def model(folder: Path) -> Path:
    """A random model of two blocks under the embedded model's tokenizer; its config.json is a shape too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    config = GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(folder: Path, rows: int = 6) -> Path:
    """All four tasks; PIQA's and WebQuestions' test rows follow their training rows in one file."""

    def write(name: str, records: list[dict[str, object]]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    choice = [{"question": f"What is {n}?", "choices": list(_WORDS), "label": n % 4} for n in range(rows)]
    for task in ("sciq", "openbookqa"):
        write(f"{task}/train.jsonl", choice)
        write(f"{task}/test.jsonl", choice)
    goals = [{"goal": f"See {n}", "sol1": "look", "sol2": "wait", "label": n % 2} for n in range(800 + rows)]
    write("piqa/validation_first1000.jsonl", goals)
    asked = [{"qId": str(n), "qText": f"who is {n}?", "answers": [_WORDS[n % 4]]} for n in range(3022 + rows)]
    write("webquestions/train.jsonl", asked)
    return folder


def preset(shape: Path) -> Preset:
    """`smoke`, on a shape of its own."""
    shapes = (ShapeDepth(str(shape)),)
    return replace(PRESETS["smoke"], records=4, heldout=2, questions=4, recalled=4, epochs=1, batch_size=4,
                   error_shapes=shapes, slowdown=shapes, obfuscate=shapes)  # fmt: skip


def accuracy(method: str, right: int, *, task: str = "sciq", seed: int = 0, loss: float = 2.0, margin: float = 1.0):
    """A tuned cell: `right` of ten questions, the first ones."""
    verdicts = [[0 if index < right else 1, index < right, margin] for index in range(10)]
    metric = {"value": right / 10, "stderr": 0.1, "verdicts": verdicts}
    name = "exact_match" if task == "webqs" else "acc"
    result = {"final_loss": loss, "heldout_after": loss, "test": {name: metric}, "recall": {name: metric}}
    settings = {"task": task, "method": method, "seed": seed, "dtype": "float32"}
    return Measured("accuracy", f"{task} {method} seed {seed}", settings, result, 1.0, {"torch": "2"})


def untuned(method: str, right: int, *, task: str = "sciq") -> Measured:
    """A model asked before it was tuned."""
    tuned = accuracy(method, right, task=task)
    result = {which: tuned.result[which] for which in ("test", "recall")}
    settings = {"task": task, "method": method, "dtype": "float32"}
    return Measured("untuned", f"{task} {method}", settings, result, 1.0, {"torch": "2"})


def error(method: str, errors: list[float], *, shape: str = "gpt2") -> Measured:
    """An error cell of two depths."""
    result = {"depths": [1, 2], "errors": {"float32": errors}}
    return Measured("error", f"{shape} {method}", {"shape": shape, "method": method}, result, 1.0, {"torch": "2"})
