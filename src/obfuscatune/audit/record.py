"""Records a run: a real worker writes down what it sees, and this side what was true.

worker with a transcript  <-  protected secret model  <-  LoRA steps, then generation
                 |                     |
            WorkerView               Truth

Where rows are sent under masks there are two workers, and a view of each and of both together (`parties`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from obfuscatune.audit.attackers import base_weights
from obfuscatune.audit.attacks.base import OnDemand
from obfuscatune.audit.attacks.scoring import Phase, TrueCall, TrueLayer, Truth
from obfuscatune.audit.attacks.stealing import losses
from obfuscatune.audit.attacks.view import WorkerView
from obfuscatune.audit.parties import MaskAccount, Party, part_views
from obfuscatune.audit.scenario import Logits, Scenario
from obfuscatune.enclave.client import DeviceClient, WorkerLink, open_link
from obfuscatune.enclave.loading import load
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.remote_lora.adapter import RemoteAdapter
from obfuscatune.errors import ConnectionLost, StorageError
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.transcript import read_transcript
from obfuscatune.training.adapter import add_lora
from obfuscatune.training.data import Example
from obfuscatune.training.loop import OptimizerSettings, Plan, make_optimizer, train

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from obfuscatune.enclave.transforms import Transform

LORA_RANK = 8
LORA_DROPOUT = 0.05
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Recording:
    """One run, seen from all sides.

    Attributes:
        views: what each party saw; the compute worker alone where no rows are masked.
        masks: what was sent under masks; None without masks.
    """

    views: Mapping[Party, WorkerView]
    truth: Truth
    masks: MaskAccount | None = None

    @property
    def view(self) -> WorkerView:
        """What the compute worker saw."""
        return self.views[Party.COMPUTE]


def parties_of(profile: Profile) -> list[Party]:
    """Whose views `record_run` makes of a run under that profile."""
    return [*Party] if profile.masks else [Party.COMPUTE]


def record_run(
    scenario: Scenario, profile: Profile, seed: int, folder: Path, device: DeviceAddress | None = None
) -> Recording:
    """Protect, fine-tune, generate, with workers of its own that record to folders in `folder`.

    They are processes; or `device`, and for masks `device:cpu` beside it, on whose buses what crosses is recorded.

    What crossed is read from there when it is used; the folder may be removed all the same.

    Raises:
        ConnectionLost: requests had to be sent twice, so that transcript and truth do not match.
        ProtectionError: rows were sent under no mask that the mask worker multiplied.
        ObfuscaTuneError: as loading, training and the link do.
    """
    of_compute, of_masks, plain = folder / "compute", folder / "mask", folder / "plain.bin"
    with ExitStack() as stack:
        client = _recorded(stack, of_compute, device)
        mask_device = None if device is None else DeviceAddress("cpu", index=device.index + 1)
        mask_client = _recorded(stack, of_masks, mask_device) if profile.masks else None
        truth, account = run_under_watch(scenario, profile, seed, client, mask_client, plain)
    view = WorkerView.from_entries(read_transcript(of_compute, mapped=True))
    if len(view.calls) != len(truth.calls):
        raise ConnectionLost(
            f"the worker was asked {len(view.calls)} times for {len(truth.calls)} products: the connection was lost "
            "meanwhile, so run the audit again, on a machine that is less busy"
        )
    views = {Party.COMPUTE: view}
    if profile.masks:
        views = part_views(view, WorkerView.from_entries(read_transcript(of_masks, mapped=True)))
    return Recording(views, truth, account)


def _recorded(stack: ExitStack, folder: Path, device: DeviceAddress | None) -> WorkerLink:
    """A client of a worker that records to `folder`; both end with the stack."""
    if device is not None:
        return stack.enter_context(DeviceClient.open(device, record=folder))
    worker = stack.enter_context(local_worker(record=folder, threads=1))
    return stack.enter_context(open_link(worker.address))


def run_under_watch(
    scenario: Scenario, profile: Profile, seed: int, client: WorkerLink, mask_client: WorkerLink | None, plain: Path
) -> tuple[Truth, MaskAccount | None]:
    """The run itself, over any link; what was true of each crossing, in order, and what was sent under masks.

    An adapter on the worker is fetched in the end, as any run does to keep it. Plain rows lie in the file `plain`.
    """
    witness = _Witness(RowsFile(plain))
    model = load(
        scenario.directory,
        client,
        profile=profile,
        dtype=torch.float32,
        base=None if profile.masks else "closed",  # the audit says more
        observer=witness,
        mask_worker=mask_client,
    )
    model.register_forward_pre_hook(witness.note_tokens, with_kwargs=True)
    bases, weights = (base_weights(it, profile.first_blocks) for it in (scenario.base, scenario.secret))
    tuned = _finetune(model, scenario, seed, witness)
    _generate(tuned, scenario, seed, witness)
    adapters = _fetched(model)
    pieces = tuple(scenario.tokenizer.decode([token]) for token in range(scenario.base.config.vocab_size))
    held_out = torch.tensor(scenario.held_out)
    secret_losses = losses(Logits(scenario.secret), held_out)
    truth = Truth(witness.calls(), witness.layers(), weights, bases, pieces, adapters, held_out, secret_losses)
    return truth, _mask_account(model)


def _mask_account(model: PreTrainedModel) -> MaskAccount | None:
    masks = model.protection.masks
    if masks is None:
        return None
    account = masks.account()
    return MaskAccount(account["rows"], account["advantage"], account["budget"])


class RowsFile:
    """Matrices in one file, which may be removed once they are mapped: memory holds those that are being looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes: list[torch.Size] = []
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")

    def append(self, rows: Tensor) -> None:
        """Write rows (n, p), as float64.

        Raises:
            StorageError: the disk is full or gone.
        """
        with self._writing():
            self._file.write(bytes_of(rows.detach().cpu().double().contiguous()))
        self._shapes.append(rows.shape)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot keep rows to {self._path}: {error.strerror}") from error

    def mapped(self) -> tuple[Tensor, ...]:
        """All of them, in order; nothing can be appended afterwards. Raises as `append` does."""
        with self._writing():
            self._file.close()
        sizes = [shape.numel() for shape in self._shapes]
        if not sum(sizes):
            return tuple(torch.empty(shape, dtype=torch.float64) for shape in self._shapes)
        everything = torch.from_file(str(self._path), shared=False, size=sum(sizes), dtype=torch.float64)
        return tuple(part.view(shape) for part, shape in zip(everything.split(sizes), self._shapes, strict=True))


@dataclass
class _Witness:
    """Notes the plain rows of every request, what the run was doing then, and the secrets that it was made under."""

    rows: RowsFile
    noted: list[TrueCall] = field(default_factory=list)
    """Without their rows."""
    secrets: dict[str, list[tuple[Transform, Transform]]] = field(default_factory=dict)
    """R_in and R_out of each layer, as often as they were drawn; the layers in the model's order."""
    tokens: tuple[int, ...] = ()
    phase: Phase = "training"
    text: int = 0

    def keyed(self, layer: str, R_in: Transform, R_out: Transform) -> None:
        """See `Observer.keyed`."""
        self.secrets.setdefault(layer, []).append((R_in, R_out))

    def requested(self, layer: str, rows: Tensor, *, transposed: bool) -> None:
        """See `Observer.requested`."""
        self.rows.append(rows)
        number, epoch = list(self.secrets).index(layer), len(self.secrets[layer]) - 1
        self.noted.append(TrueCall(number, transposed, _ELSEWHERE, self.tokens, self.phase, self.text, epoch))

    def note_tokens(self, _module: object, _args: object, kwargs: dict[str, Any]) -> None:
        """A hook before the model's forward pass."""
        self.tokens = tuple(kwargs["input_ids"].reshape(-1).tolist())

    def calls(self) -> tuple[TrueCall, ...]:
        """What was noted, with the rows."""
        return tuple(replace(call, rows=rows) for call, rows in zip(self.noted, self.rows.mapped(), strict=True))

    def layers(self) -> tuple[TrueLayer, ...]:
        """The secrets of all layers."""
        sides = {name: zip(*secrets, strict=True) for name, secrets in self.secrets.items()}
        return tuple(TrueLayer(name, _dense(R_in), _dense(R_out)) for name, (R_in, R_out) in sides.items())


_ELSEWHERE = torch.empty(0)
"""Stands for rows that lie in the file."""


def _dense(transforms: Sequence[Transform]) -> OnDemand:
    """Each R as a matrix, float64."""
    return OnDemand([partial(_matrix, R) for R in transforms])


def _matrix(R: Transform) -> Tensor:
    return R.apply(torch.eye(R.dim, dtype=torch.float64))


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


def _finetune(model: PreTrainedModel, scenario: Scenario, seed: int, witness: _Witness) -> PeftModel:
    """LoRA on every linear layer, one example a step; examples come back in each epoch in another order."""
    size = scenario.size
    tuned = add_lora(model, r=LORA_RANK, alpha=16, dropout=LORA_DROPOUT, targets="all-linear", seed=seed)
    examples = [Example(ids, ids) for ids in scenario.examples(seed)]
    plan = Plan(len(examples), batch_size=1, accumulation=1, seed=seed)
    total = size.epochs * plan.steps_per_epoch
    optimizer = make_optimizer(tuned, weight_decay=0.0)
    steps = train(
        tuned,
        optimizer,
        examples,
        plan,
        OptimizerSettings(LEARNING_RATE, "constant", warmup_steps=0, clip=1.0, total_steps=total),
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
