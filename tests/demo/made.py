"""Sides and results made by hand."""

import torch
from safetensors.torch import save

from obfuscatune.demo.result import Result, Shape, check, compare_runs
from obfuscatune.demo.run import DemoRun, Seconds
from obfuscatune.demo.settings import Settings
from obfuscatune.evaluation.scoring import Metric, Verdict
from obfuscatune.training.adapter import WEIGHTS
from obfuscatune.training.data_files import Completion
from obfuscatune.training.loop import StepEvent

LINK = {"crossings": 62, "bytes_sent": 1_000_000, "bytes_received": 2_000_000}


def step(number, loss):
    return StepEvent(step=number, epoch=1, loss=loss, lr=0.1, grad_norm=1.0, tokens=10, seconds=0.1)


def metric(right, answers=None, margin=1.0):
    answers = answers or ["x"] * 10
    return Metric("exact_match", tuple(Verdict(a, index < right, margin) for index, a in enumerate(answers)))


def adapter(folder, **weights):
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(save({name: torch.tensor(values) for name, values in weights.items()}))
    return folder


def side(name, folder, right=9):
    steps = (step(1, 7.0), step(2, 1.0))
    link = LINK if name == "protected" else None
    weights = adapter(folder / name, a=[0.5, -2.0])
    return DemoRun(name, metric(0), metric(right), steps, weights, Seconds(1.0, 1.0, 1.0, 1.0), link)


def result(protected, plain):
    """A whole demo of ten questions."""
    settings = Settings(seed=0, quick=False)
    differences = compare_runs(protected, plain)
    questions = [Completion(f"Question: {index} <b>?\nAnswer:", " x") for index in range(10)]
    return Result(
        settings,
        Shape(1000, 264),
        protected,
        plain,
        differences,
        check(settings, protected, plain, differences),
        questions,
        {"torch": "2"},
        90.0,
    )
