"""Learning rates, against transformers' own schedules."""

import pytest
import torch
from transformers import get_scheduler

from obfuscatune.training.loop import OptimizerSettings


@pytest.mark.parametrize("warmup", [0, 1, 4, 12])
@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
def test_the_rates_are_those_of_transformers(name, theirs, warmup):
    total = 12
    settings = OptimizerSettings(0.3, name, warmup, clip=1.0, total_steps=total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert settings.lr_at(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
