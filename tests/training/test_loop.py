"""The loop, against Hugging Face's Trainer and against the sums done by hand."""

import copy
import math

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from obfuscatune.errors import NonFiniteError
from obfuscatune.training.adapter import add_lora
from obfuscatune.training.data import IGNORED, Example
from obfuscatune.training.loop import OptimizerSettings, Plan, collate, make_optimizer, mean_loss, train

PAD = 256


def example(index: int) -> Example:
    """Sequences of 5 to 12 tokens, of which all but the first 2 to 4 are trained on."""
    ids = tuple((7 * index + 13 * place) % 250 for place in range(5 + 3 * index % 8))
    cut = 2 + index % 3
    return Example(ids, (IGNORED,) * cut + ids[cut:])


EXAMPLES = [example(index) for index in range(12)]
PLAN = Plan(len(EXAMPLES), batch_size=2, accumulation=3, seed=4)
SETTINGS = OptimizerSettings(lr=0.01, schedule="linear", warmup_steps=1, clip=0.5, total_steps=4)


def with_lora(model, dropout=0.0):
    return add_lora(model, r=4, alpha=8.0, dropout=dropout, targets="all-linear", seed=3)


def run(model, *, dropout=0.0, weight_decay=0.01, plan=PLAN, optimizer_settings=SETTINGS, examples=EXAMPLES):
    wrapped = with_lora(copy.deepcopy(model), dropout)
    optimizer = make_optimizer(wrapped, weight_decay=weight_decay)
    return wrapped, list(train(wrapped, optimizer, examples, plan, optimizer_settings, pad_id=PAD))


def factors(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def still(model):
    """The model without dropout, in which two ways to the same sum can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_losses_and_factors_are_those_of_trainer(still, tmp_path):
    ours, events = run(still)
    ordered = [EXAMPLES[index] for step in range(4) for micro in PLAN.micro_batches(step) for index in micro]

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset or self.train_dataset)

    def to_batch(examples):
        batch = collate(examples, PAD, torch.device("cpu"))
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    theirs = with_lora(copy.deepcopy(still))
    trainer = InOrder(
        theirs,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=PLAN.batch_size,
            gradient_accumulation_steps=PLAN.accumulation,
            max_steps=SETTINGS.total_steps,
            learning_rate=SETTINGS.lr,
            lr_scheduler_type=SETTINGS.schedule,
            warmup_steps=SETTINGS.warmup_steps,
            max_grad_norm=SETTINGS.clip,
            weight_decay=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=ordered,
        data_collator=to_batch,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    # float32: the two weight the same sum by tokens in another order.
    assert [event.loss for event in events] == pytest.approx([entry["loss"] for entry in logged], rel=1e-4)
    assert [event.lr for event in events] == pytest.approx([entry["learning_rate"] for entry in logged])
    assert [event.grad_norm for event in events] == pytest.approx([entry["grad_norm"] for entry in logged], rel=1e-3)
    for name, expected in factors(theirs).items():
        torch.testing.assert_close(factors(ours)[name], expected, rtol=0, atol=2e-5)


def test_accumulation_weighs_by_tokens(still):
    still.double()
    apart, apart_events = run(still)
    whole, whole_events = run(still, plan=Plan(len(EXAMPLES), batch_size=6, accumulation=1, seed=4))
    # float64; the loss is computed in float32 by transformers (ForCausalLMLoss upcasts by `.float()`).
    assert [event.loss for event in apart_events] == pytest.approx([event.loss for event in whole_events], rel=1e-5)
    assert [event.tokens for event in apart_events] == [event.tokens for event in whole_events]
    for name, expected in factors(whole).items():
        torch.testing.assert_close(factors(apart)[name], expected, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_trained_tokens(still):
    _, (first, *_) = run(still)
    total = tokens = 0
    with torch.no_grad():
        for index in (index for micro in PLAN.micro_batches(0) for index in micro):
            ids, labels = EXAMPLES[index].input_ids, EXAMPLES[index].labels
            log_p = still(torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(1, len(ids)):
                if labels[place] != IGNORED:
                    total -= log_p[place - 1, labels[place]].item()
                    tokens += 1
    assert first.tokens == tokens
    assert first.loss == pytest.approx(total / tokens, rel=1e-5)
    chosen = [EXAMPLES[index] for micro in PLAN.micro_batches(0) for index in micro]
    assert mean_loss(with_lora(still), chosen, batch_size=4, pad_id=PAD) == pytest.approx(first.loss, rel=1e-5)


def test_a_run_depends_on_its_seed_and_on_no_generator(model):
    runs = []
    for draws in (0, 1):
        torch.manual_seed(draws)
        state = torch.get_rng_state()
        runs.append(run(model, dropout=0.3))
        assert torch.equal(torch.get_rng_state(), state), "the caller's generator was used"
    (one, one_events), (other, other_events) = runs
    assert [event.loss for event in one_events] == [event.loss for event in other_events]
    assert all(torch.equal(p, factors(other)[name]) for name, p in factors(one).items())
    reseeded = Plan(len(EXAMPLES), 2, 3, seed=5)
    assert run(model, dropout=0.3, plan=reseeded)[1][0].loss != one_events[0].loss


def test_every_pass_drops_other_units(model):
    alike = Plan(1, batch_size=1, accumulation=1, seed=4)
    _, events = run(
        model, plan=alike, examples=EXAMPLES[:1], optimizer_settings=OptimizerSettings(1e-30, "constant", 0, 1.0, 3)
    )
    assert len({event.loss for event in events}) == 3


def test_weights_that_are_not_finite_stop_the_run_before_the_step(model):
    wrapped = with_lora(model)
    before = {name: p.clone() for name, p in factors(wrapped).items()}
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    steps = train(wrapped, make_optimizer(wrapped, weight_decay=0.1), EXAMPLES, PLAN, SETTINGS, pad_id=PAD)
    with pytest.raises(NonFiniteError, match="the loss is nan at step 1; nothing of this step was kept"):
        next(steps)
    assert all(torch.equal(p, before[name]) for name, p in factors(wrapped).items())


def test_a_rate_that_is_far_too_high_is_reported(model):
    with pytest.raises(NonFiniteError, match=r"the (loss|gradient norm) is (nan|inf) at step"):
        run(model, optimizer_settings=OptimizerSettings(1e30, "constant", 0, 1.0, 50))
