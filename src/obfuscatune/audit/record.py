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

from obfuscatune.audit.architecture import Logits
from obfuscatune.audit.attackers import base_weights
from obfuscatune.audit.attacks.stealing import losses
from obfuscatune.audit.attacks.truth import Phase, TrueCall, TrueLayer, Truth
from obfuscatune.audit.attacks.view import WorkerView
from obfuscatune.audit.scenario import Scenario
from obfuscatune.enclave.linear import InFlight, OffloadedProduct
from obfuscatune.enclave.link import AdapterLink, WorkerLink
from obfuscatune.enclave.load import load
from obfuscatune.enclave.local import local_worker
from obfuscatune.enclave.offloaded import Offloaded
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.remote.adapter import RemoteAdapter
from obfuscatune.tuning.adapter import add_lora
from obfuscatune.tuning.batches import Plan
from obfuscatune.tuning.data import Example
from obfuscatune.tuning.loop import Descent, make_optimizer, train
from obfuscatune.wire.errors import ConnectionLost
from obfuscatune.wire.transcript import read_transcript

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from obfuscatune.enclave.transforms import Transform

LORA_RANK = 8
LORA_DROPOUT = 0.05
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Recording:
    """One run, seen from both sides."""

    view: WorkerView
    truth: Truth


def record_run(scenario: Scenario, profile: Profile, seed: int, folder: Path) -> Recording:
    """Protect, fine-tune, generate, with a worker of its own that records to `folder`.

    What crossed is read from there when it is used; the folder may be removed all the same.

    Raises:
        ConnectionLost: requests had to be sent twice, so that transcript and truth do not match.
        ObfuscaTuneError: as loading, training and the link do.
    """
    with local_worker(record=folder, threads=1) as worker:
        link = WorkerLink.open(worker.address)
        try:
            truth = run_under_watch(scenario, profile, seed, link)
        finally:
            link.close()
    view = WorkerView.from_entries(read_transcript(folder, mapped=True))
    if len(view.calls) != len(truth.calls):
        raise ConnectionLost(
            f"the worker was asked {len(view.calls)} times for {len(truth.calls)} products: the connection was lost "
            "meanwhile, so run the audit again, on a machine that is less busy"
        )
    return Recording(view, truth)


def run_under_watch(scenario: Scenario, profile: Profile, seed: int, link: WorkerLink) -> Truth:
    """The run itself, over any link; what was true of each crossing, in order.

    An adapter on the worker is fetched in the end, as any run does to keep it.
    """
    model = load(scenario.directory, link, profile=profile, dtype=torch.float32, base="closed")  # the audit says more
    witness = _Witness()
    bases, weights = (base_weights(it, profile.first_blocks) for it in (scenario.base, scenario.secret))
    layers = _watch(model, weights, witness)
    tuned = _finetune(model, scenario, seed, witness, layers)
    _generate(tuned, scenario, seed, witness)
    adapters = _fetched(model)
    pieces = tuple(scenario.tokenizer.decode([token]) for token in range(scenario.base.config.vocab_size))
    held_out = torch.tensor(scenario.held_out)
    secret_losses = losses(Logits(scenario.secret), held_out)
    true_layers = tuple(layer.truth() for layer in layers)
    return Truth(tuple(witness.calls), true_layers, bases, pieces, adapters, held_out, secret_losses)


@dataclass
class _Witness:
    """Notes the plain rows of every crossing, with what the run was doing then."""

    calls: list[TrueCall] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    phase: Phase = "training"
    text: int = 0

    def note(self, layer: int, transposed: bool, rows: Tensor, epoch: int) -> None:
        plain = rows.detach().double().cpu().clone()
        self.calls.append(TrueCall(layer, transposed, plain, self.tokens, self.phase, self.text, epoch))


class _WatchedProduct:
    """In the place of an `OffloadedProduct`: does what that does, and tells the witness."""

    def __init__(self, product: OffloadedProduct, layer: int, epoch: int, witness: _Witness) -> None:
        self._product, self._layer, self._epoch, self._witness = product, layer, epoch, witness

    def start_forward(self, x: Tensor) -> InFlight:
        self._witness.note(self._layer, False, x, self._epoch)
        return self._product.start_forward(x)

    def start_backward(self, g: Tensor) -> InFlight:
        self._witness.note(self._layer, True, g, self._epoch)
        return self._product.start_backward(g)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._product, name)


class _WatchedAdapter:
    """In the place of what a `RemoteAdapter` is on the worker; the plain rows follow from those that it sends."""

    def __init__(self, remote: AdapterLink, layer: _WatchedLayer) -> None:
        self._remote, self._layer = remote, layer
        self._R_in, self._R_out = layer.offloaded.R_in, layer.offloaded.R_out

    def forward(self, rows: Tensor, **how: Any) -> Tensor:
        self._layer.note(False, self._R_in.inverse(rows.double()))
        return self._remote.forward(rows, **how)

    def backward(self, rows: Tensor, **how: Any) -> Tensor:
        self._layer.note(True, self._R_out.apply_transpose(rows.double()))
        return self._remote.backward(rows, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)


class _WatchedLayer:
    """Keeps the witness before a layer's product, whichever that is, and notes its secrets."""

    def __init__(self, offloaded: Offloaded, layer: int, W: Tensor, witness: _Witness) -> None:
        self.offloaded, self._layer, self._W, self._witness = offloaded, layer, W, witness
        self._secrets: list[tuple[Tensor, Tensor]] = []
        self._place = offloaded.crossing.multiply_by
        self.multiply_by(offloaded.crossing._product)
        offloaded.crossing.multiply_by = self.multiply_by  # type: ignore[method-assign]  # what re-keying calls

    def multiply_by(self, product: OffloadedProduct) -> None:
        epoch = len(self._secrets)
        self._secrets.append((_dense(self.offloaded.R_in), _dense(self.offloaded.R_out)))
        self._place(_WatchedProduct(product, self._layer, epoch, self._witness))  # type: ignore[arg-type]

    def note(self, transposed: bool, rows: Tensor) -> None:
        """Plain rows of a call under the newest secrets."""
        self._witness.note(self._layer, transposed, rows, len(self._secrets) - 1)

    def watch(self, adapter: RemoteAdapter) -> None:
        """Keep the witness before the layer's adapter on the worker too, however often it is attached anew."""
        attach = adapter.attach

        def attach_watched() -> None:
            attach()
            adapter._remote = _WatchedAdapter(adapter.remote, self)  # type: ignore[assignment]

        adapter.attach = attach_watched  # type: ignore[method-assign]  # what re-keying calls
        adapter._remote = _WatchedAdapter(adapter.remote, self)  # type: ignore[assignment]

    def truth(self) -> TrueLayer:
        R_in, R_out = zip(*self._secrets, strict=True)
        return TrueLayer(self.offloaded.name, self._W, R_in, R_out)


def _watch(model: PreTrainedModel, weights: tuple[Tensor, ...], witness: _Witness) -> list[_WatchedLayer]:
    """Put the witness before every product and before the model's input."""
    offloaded = model.protection.offloaded
    layers = [_WatchedLayer(it, n, W, witness) for n, (it, W) in enumerate(zip(offloaded, weights, strict=True))]

    def note_tokens(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        witness.tokens = tuple(kwargs["input_ids"].reshape(-1).tolist())

    model.register_forward_pre_hook(note_tokens, with_kwargs=True)
    return layers


def _dense(transform: Transform) -> Tensor:
    """R as a matrix, float64."""
    return transform.apply(torch.eye(transform.dim, dtype=torch.float64))


def _fetched(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """What the adapter on the worker adds to each W (p, q), float64; empty where it is here."""
    protection = model.protection
    if protection.adapters is None:
        return ()
    protection.adapters.fetch()
    return tuple(_delta(protection.adapters.of(it)) for it in protection.offloaded)


def _delta(adapter: RemoteAdapter) -> Tensor:
    """s A B of the layers that share a matrix, side by side."""
    with torch.no_grad():
        return torch.cat([it.scale * (it.lora_b.double() @ it.lora_a.double()).T for it in adapter.layers], dim=1)


def _finetune(
    model: PreTrainedModel, scenario: Scenario, seed: int, witness: _Witness, layers: list[_WatchedLayer]
) -> PeftModel:
    """LoRA on every linear layer, one example a step; examples come back in each epoch in another order."""
    size = scenario.size
    tuned = add_lora(model, r=LORA_RANK, alpha=16, dropout=LORA_DROPOUT, targets="all-linear", seed=seed)
    examples = [Example(ids, ids) for ids in scenario.examples(seed)]
    plan = Plan(len(examples), batch_size=1, accumulation=1, seed=seed)
    total = size.epochs * plan.steps_per_epoch
    optimizer = make_optimizer(tuned, weight_decay=0.0)
    for layer in layers if model.protection.adapters is not None else ():
        layer.watch(model.protection.adapters.of(layer.offloaded))
    steps = train(
        tuned,
        optimizer,
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
