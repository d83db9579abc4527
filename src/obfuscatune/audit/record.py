"""Records a run: a real worker writes down what it sees, and this side what was true.

worker with a transcript  <-  protected secret model  <-  LoRA steps, then generation
                 |                     |
            WorkerView               Truth
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from obfuscatune.attacks.truth import Phase, TrueCall, TrueLayer, Truth
from obfuscatune.attacks.view import WorkerView
from obfuscatune.audit.attackers import base_weights
from obfuscatune.audit.scenario import Scenario
from obfuscatune.enclave.linear import InFlight, OffloadedProduct
from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.load import load
from obfuscatune.enclave.local import local_worker
from obfuscatune.enclave.offloaded import Offloaded
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.protection import Protection
from obfuscatune.tuning.adapter import add_lora
from obfuscatune.tuning.batches import Plan
from obfuscatune.tuning.data import Example
from obfuscatune.tuning.loop import Descent, make_optimizer, train
from obfuscatune.wire.errors import ProtectionError
from obfuscatune.wire.transcript import read_transcript

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from obfuscatune.enclave.transforms import Transform

LORA_RANK = 8
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Recording:
    """One run, seen from both sides."""

    view: WorkerView
    truth: Truth


def record_run(scenario: Scenario, profile: Profile, seed: int, folder: Path) -> Recording:
    """Protect, fine-tune, generate, with a worker of its own that records to `folder`.

    Raises:
        ObfuscaTuneError: as loading, training and the link do.
    """
    with local_worker(record=folder, threads=1) as worker:
        link = WorkerLink.open(worker.address)
        try:
            truth = run_under_watch(scenario, profile, seed, link)
        finally:
            link.close()
    return Recording(WorkerView.from_entries(read_transcript(folder)), truth)


def run_under_watch(scenario: Scenario, profile: Profile, seed: int, link: WorkerLink) -> Truth:
    """The run itself, over any link; what was true of each crossing, in order."""
    model = load(scenario.directory, link, profile=profile, dtype=torch.float32)
    witness = _Witness()
    bases, weights = base_weights(scenario.base, profile), base_weights(scenario.secret, profile)
    layers = _watch(model, weights, witness)
    tuned = _finetune(model, scenario, seed, witness)
    _generate(tuned, scenario, seed, witness)
    pieces = tuple(scenario.tokenizer.decode([token]) for token in range(scenario.base.config.vocab_size))
    return Truth(tuple(witness.calls), tuple(layers), bases, pieces)


@dataclass
class _Witness:
    """Notes the plain rows of every crossing, with what the run was doing then."""

    calls: list[TrueCall] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    phase: Phase = "training"
    text: int = 0
    epoch: int = 0

    def note(self, layer: int, transposed: bool, rows: Tensor) -> None:
        plain = rows.detach().double().cpu().clone()
        self.calls.append(TrueCall(layer, transposed, plain, self.tokens, self.phase, self.text, self.epoch))


class _WatchedProduct(OffloadedProduct):
    """Does what it is asked, and tells the witness."""

    def __init__(self, protection: Protection, offloaded: Offloaded, layer: int, witness: _Witness) -> None:
        if protection.link is None:
            raise ProtectionError("this profile sends nothing to a worker: there is nothing to audit")
        super().__init__(protection.link, offloaded.matrix_id, offloaded.R_in, offloaded.R_out, protection.mixer)
        self._layer, self._witness = layer, witness

    def start_forward(self, x: Tensor) -> InFlight:
        self._witness.note(self._layer, False, x)
        return super().start_forward(x)

    def start_backward(self, g: Tensor) -> InFlight:
        self._witness.note(self._layer, True, g)
        return super().start_backward(g)


def _watch(model: PreTrainedModel, weights: tuple[Tensor, ...], witness: _Witness) -> list[TrueLayer]:
    """Put the witness before every product and before the model's input; the secrets of the layers."""
    protection: Protection = model.protection
    secrets = []
    for index, (offloaded, W) in enumerate(zip(protection.offloaded, weights, strict=True)):
        secrets.append(TrueLayer(offloaded.name, W, _dense(offloaded.R_in), _dense(offloaded.R_out)))
        offloaded.crossing.multiply_by(_WatchedProduct(protection, offloaded, index, witness))

    def note_tokens(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        witness.tokens = tuple(kwargs["input_ids"].reshape(-1).tolist())

    model.register_forward_pre_hook(note_tokens, with_kwargs=True)
    return secrets


def _dense(transform: Transform) -> Tensor:
    """R as a matrix, float64."""
    return transform.apply(torch.eye(transform.dim, dtype=torch.float64))


def _finetune(model: PreTrainedModel, scenario: Scenario, seed: int, witness: _Witness) -> PeftModel:
    """LoRA on every linear layer, one example a step; examples come back in each epoch in another order."""
    size = scenario.size
    tuned = add_lora(model, r=LORA_RANK, alpha=16, dropout=0.05, targets="all-linear", seed=seed)
    examples = [Example(ids, ids) for ids in scenario.examples(seed)]
    plan = Plan(len(examples), batch_size=1, accumulation=1, seed=seed)
    total = size.epochs * plan.steps_per_epoch
    steps = train(
        tuned,
        make_optimizer(tuned, weight_decay=0.0),
        examples,
        plan,
        Descent(LEARNING_RATE, "constant", warmup_steps=0, clip=1.0, total_steps=total),
        pad_id=0,
    )
    witness.phase = "training"
    for step in range(total):
        ((witness.text,),) = plan.micro_batches(step)
        next(steps)
    return tuned.eval()


def _generate(model: PeftModel, scenario: Scenario, seed: int, witness: _Witness) -> None:
    """Continue each prompt by sampling: one pass over the prompt, then one for each token."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for number, prompt in enumerate(scenario.prompts(seed)):
            witness.text = number
            ids, past = torch.tensor([prompt]), None
            for step in range(scenario.size.new_tokens):
                witness.phase = "decoding" if step else "prompt"
                output = model(input_ids=ids, past_key_values=past, use_cache=True)
                past = output.past_key_values
                ids = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
