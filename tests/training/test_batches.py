"""Order and padding."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.training.data import IGNORED, Example
from obfuscatune.training.loop import Plan, collate, epoch_order

CPU = torch.device("cpu")


def test_batches_are_padded_on_the_right():
    short, long = Example((1, 2), (IGNORED, 2)), Example((3, 4, 5), (3, 4, 5))
    batch = collate([short, long], pad_id=9, device=CPU)
    assert batch.input_ids.tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 2, IGNORED], [3, 4, 5]]
    assert batch.trained_tokens == 1 + 2


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_every_epoch_has_every_example_once(examples, batch_size, accumulation, epoch):
    plan = Plan(examples, batch_size, accumulation, seed=5)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    micro_batches = [micro for step in steps for micro in plan.micro_batches(step)]
    assert sorted(index for micro in micro_batches for index in micro) == list(range(examples))
    assert all(0 < len(micro) <= batch_size for micro in micro_batches)
    assert all(len(plan.micro_batches(step)) <= accumulation for step in steps)
    assert {plan.epoch(step) for step in steps} == {epoch}


def test_the_order_depends_on_seed_and_epoch_and_on_no_generator():
    first = epoch_order(50, seed=0, epoch=0)
    random.seed(3)
    torch.manual_seed(3)
    assert epoch_order(50, seed=0, epoch=0) == first
    assert first not in (epoch_order(50, 0, 1), epoch_order(50, 1, 0), list(range(50)))


def test_the_order_is_the_same_for_ever():
    assert epoch_order(8, seed=0, epoch=0) == [4, 2, 6, 0, 7, 5, 1, 3]
