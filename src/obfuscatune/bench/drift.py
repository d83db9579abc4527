"""`bench drift`: a worker that changes every product by less than the tolerance, for a whole fine-tuning run.

The embedded model learns the embedded notes: plain in float64, which the others are compared with, and in float32;
under each profile with an honest worker; and with one that drifts (`drift_worker`), by less and less until it passes.

What it aims at, with the base model and every secret transform at hand, and aims at anew as the adapter changes:

    loss    forward, products move along the mean gradient of the loss; backward, gradients as if the loss were to rise
    token   forward, products move so that one token becomes likelier; backward, gradients as if it were to
    plant   the same backward, and forward the opposite, for which the adapter learns to make up: it keeps the bias
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from obfuscatune.assets import clinic_notes_path, tiny_model_path
from obfuscatune.backend import Computer
from obfuscatune.bench.drift_worker import Aim, DriftingComputer, Push, Way, serving
from obfuscatune.bench.processes import Progress
from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.target_layers import LayerGroup, find_groups
from obfuscatune.enclave.transforms import Transform
from obfuscatune.errors import ConfigError, WrongProduct
from obfuscatune.report.page import environment, markdown_table
from obfuscatune.training.adapter import add_lora
from obfuscatune.training.data import IGNORED, Example, Source, load_dataset
from obfuscatune.training.loop import Batch, OptimizerSettings, Plan, collate, make_optimizer, mean_loss, train
from obfuscatune.training.run import load_plain
from obfuscatune.training.tokens import read_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Goal = Literal["loss", "token", "plant"]
GOALS: tuple[Goal, ...] = ("loss", "token", "plant")
SIZES = (0.9, 0.5, 0.25, 0.18, 0.13, 0.09, 0.06)
"""Largest change of a row over its tolerance; tried one after the other, until one passes the whole run."""
FLOAT64, FLOAT32 = "plain, float64", "plain, float32"
_AIMED_AT = 16
"""Examples from which a worker takes its directions."""
_AIMED_EVERY = 100
"""Steps after which it takes them anew."""
_RANK, _ALPHA, _SEED = 16, 32.0, 0
_MEASURED_AT_ONCE = 30
Factors = dict[str, Tensor]
"""Of an adapter, by name, float64."""


@dataclass(frozen=True)
class DriftRow:
    """One run, compared with plain in float64."""

    side: str
    """Plain, or the profile."""
    goal: str
    """What the worker aims at; empty if it is honest."""
    way: str
    """How it changes products; see `drift_worker`."""
    size: float
    """Largest change of a row over its tolerance, as far as the worker knows it."""
    products: int
    """That the worker computed."""
    caught: int | None
    """The step, from 1, in which a product was found wrong; None if all passed."""
    loss: float = math.nan
    """On held-out records after the last step, of the plain model with the adapter; nats a token."""
    adapter: float = math.nan
    """How far the products B A of all layers are from those of plain in float64, over their norm."""
    planted: float = math.nan
    """Mean, over held-out tokens, of how much larger the target's logit is than by the adapter of plain in float64."""
    largest_planted: float = math.nan
    """The largest of any token, in either direction."""
    served: float = math.nan
    """Mean of how much larger the target's logit is while the worker computes than plain with the same adapter."""
    largest_served: float = math.nan
    """The largest of any token, in either direction."""


@dataclass(frozen=True)
class DriftBench:
    """What is measured."""

    steps: int = 20
    profiles: tuple[str, ...] = ("private", "guarded")
    sizes: tuple[float, ...] = SIZES
    batch: int = 2
    lr: float = 2e-3
    held_out: int = 20
    """Records by which adapters are compared."""
    goals: tuple[Goal, ...] = GOALS

    def check(self) -> None:
        """Return where all of it can be measured.

        Raises:
            ConfigError: a size is no positive number, or a profile sends nothing, or has its adapter on the worker.
        """
        for size in self.sizes:
            if not 0 < size < math.inf:
                raise ConfigError(f"--size {size:g}: a share of the tolerance, above 0")
        for name in self.profiles:
            profile = resolve(name)
            if not profile.offload:
                raise ConfigError(f"--profile {name} sends nothing to a worker: no product can be changed")
            if profile.lora_on == "worker":
                raise ConfigError(
                    f"--profile {name} has the adapter on the worker, who can change it at will: choose others"
                )

    def run(self, progress: Progress) -> DriftResult:
        """Measure; with 1,000 steps, a few minutes for each run.

        Raises:
            WireError: a worker was lost.
        """
        task = _Task.read(self)
        rows: list[DriftRow] = []

        def done(row: DriftRow) -> DriftRow:
            rows.append(row)
            fate = f"caught in step {row.caught}" if row.caught else f"loss {row.loss:.6f}, adapter {row.adapter:.1e}"
            progress(f"{row.side} {row.way} {row.goal} {row.size:g}: {row.products} products, {fate}")
            return row

        for side, dtype in ((FLOAT64, torch.float64), (FLOAT32, torch.float32)):
            done(task.plain(side, dtype))
        for profile in self.profiles:
            done(task.protected(profile, DriftingComputer(), "loss"))
            for way in ways(profile):
                for goal in self.goals:
                    for size in self.sizes:
                        if done(task.protected(profile, DriftingComputer(way, size), goal)).caught is None:
                            break
        return DriftResult(asdict(self) | {"token": task.token_text}, rows, environment())


def ways(profile: str) -> tuple[Way, ...]:
    """How a worker can change products under that profile: of rows under a mask, a change that follows the rows would
    follow the mask, which is 2^28 times as large."""
    return ("offset",) if resolve(profile).masks else ("weights", "offset")


@dataclass(frozen=True)
class DriftResult:
    """What was measured."""

    bench: dict[str, Any]
    """The settings of the `DriftBench`, and the target token."""
    rows: list[DriftRow]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file; what was not measured is null."""
        rows = [{name: _or_none(value) for name, value in asdict(row).items()} for row in self.rows]
        return {"bench": self.bench, "runs": rows, "environment": self.environment}

    def as_markdown(self) -> str:
        """A row for each run."""
        columns = ["run", "aims at", "way", "size, of tau", "products", "caught in step", "held-out loss"]
        columns += ["loss - plain", "adapter off by", "target's logit, planted", "largest", "while served", "largest"]
        exact = self.rows[0].loss
        table = []
        for row in self.rows:
            caught = "-" if not row.size else ("never" if row.caught is None else str(row.caught))
            measured = ["" for _ in range(7)]
            if row.caught is None:
                found = (row.planted, row.largest_planted, row.served, row.largest_served)
                measured = [f"{row.loss:.5f}", f"{row.loss - exact:+.1e}", f"{row.adapter:.1e}"]
                measured += ["" if math.isnan(it) else f"{it:.1e}" for it in found]
            table.append((row.side, row.goal, row.way, f"{row.size:g}", row.products, caught, *measured))
        about = f"{self.bench['steps']} LoRA steps of {self.bench['batch']}, target token {self.bench['token']!r}."
        return f"{about}\n\n{markdown_table(columns, table, 3)}\n"


@dataclass
class _Secrets:
    """An observer that keeps the transforms of each layer."""

    transforms: dict[str, tuple[Transform, Transform]] = field(default_factory=dict)

    def keyed(self, layer: str, R_in: Transform, R_out: Transform) -> None:
        """See `Observer.keyed`."""
        self.transforms[layer] = R_in, R_out

    def requested(self, layer: str, rows: Tensor, *, transposed: bool) -> None:
        """See `Observer.requested`."""


class _Task:
    """One fine-tuning task, and the plain float64 model by which every adapter is measured."""

    def __init__(
        self, bench: DriftBench, trained: tuple[Example, ...], held_out: tuple[Example, ...], tokenizer: Any
    ) -> None:
        self._bench, self._trained, self._held_out = bench, trained, held_out
        self._pad = int(tokenizer.eos_token_id)
        self.token = next(label for label in trained[0].labels if label != IGNORED)
        self.token_text = str(tokenizer.decode([self.token]))
        self._judge = _with_lora(_model(torch.float64))
        self._exact: tuple[Factors, Tensor] | None = None

    @classmethod
    def read(cls, bench: DriftBench) -> _Task:
        """The embedded model's."""
        tokenizer = read_tokenizer(tiny_model_path())
        sets = (
            load_dataset(Source.of(clinic_notes_path() / f"{name}.jsonl", None, "train"), tokenizer, 256, "error")
            for name in ("train", "heldout")
        )
        trained, held_out = (it.examples for it in sets)
        return cls(bench, trained, held_out[: bench.held_out], tokenizer)

    def plain(self, side: str, dtype: torch.dtype) -> DriftRow:
        """A run without a worker; the first is what the others are compared with."""
        model = _with_lora(_model(dtype))
        for _ in self._steps(model):
            pass
        return self._measured(DriftRow(side, "", "", 0.0, 0, None), model, None)

    def protected(self, profile: str, computer: DriftingComputer, goal: Goal) -> DriftRow:
        """A run with a worker of that computer."""
        honest = not computer.size
        row = DriftRow(profile, "" if honest else goal, "" if honest else computer.way, computer.size, 0, None)
        model, secrets = _model(torch.float32), _Secrets()
        groups = find_groups(model, resolve(profile).first_blocks)
        step = 0
        with _protected(model, profile, computer, secrets):
            tuned = _with_lora(model)
            try:
                self._aim(computer, goal, groups, secrets, tuned)
                for step in self._steps(tuned):
                    if step % _AIMED_EVERY == 0:
                        self._aim(computer, goal, groups, secrets, tuned)
                return self._measured(row, tuned, computer)
            except WrongProduct:
                return replace(row, products=computer.products, caught=step + 1)

    def _steps(self, model: PeftModel) -> Iterator[int]:
        """Fine-tune; the number of steps taken, after each."""
        bench = self._bench
        plan = Plan(len(self._trained), bench.batch, 1, 0)
        settings = OptimizerSettings(bench.lr, "linear", min(5, bench.steps), 1.0, bench.steps)
        optimizer = make_optimizer(model, weight_decay=0.0)
        for event in train(model, optimizer, self._trained, plan, settings, pad_id=self._pad):
            yield event.step

    def _measured(self, row: DriftRow, model: PeftModel, computer: DriftingComputer | None) -> DriftRow:
        factors = self._judge_adapter(model)
        loss = mean_loss(self._judge, self._held_out, batch_size=_MEASURED_AT_ONCE, pad_id=self._pad)
        logits = self._target_logits(self._judge)
        self._exact = self._exact or (factors, logits)
        planted = logits - self._exact[1]
        row = replace(row, loss=loss, adapter=_distance(factors, self._exact[0]))
        row = replace(row, planted=float(planted.mean()), largest_planted=float(planted.abs().max()))
        if computer is None:
            return row
        served = self._target_logits(model) - logits
        row = replace(row, served=float(served.mean()), largest_served=float(served.abs().max()))
        return replace(row, products=computer.products)

    def _judge_adapter(self, model: PeftModel) -> Factors:
        """Put a model's adapter, as it is now, on the plain float64 model; its factors."""
        factors = {name: it.detach().double().clone() for name, it in model.named_parameters() if ".lora_" in name}
        self._judge.load_state_dict(factors, strict=False)
        return factors

    @torch.no_grad()
    def _target_logits(self, model: PeftModel) -> Tensor:
        """Of the target token, wherever a trained token of the held-out records is predicted; float64."""
        model.eval()
        found = []
        for start in range(0, len(self._held_out), _MEASURED_AT_ONCE):
            batch = collate(self._held_out[start : start + _MEASURED_AT_ONCE], self._pad, torch.device("cpu"))
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            found.append(logits[:, :-1][batch.labels[:, 1:] != IGNORED][:, self.token].double())
        return torch.cat(found)

    def _aim(
        self, computer: DriftingComputer, goal: Goal, groups: list[LayerGroup], secrets: _Secrets, model: PeftModel
    ) -> None:
        """Give the worker its directions, for the adapter as it is now."""
        if not computer.size:
            return
        self._judge_adapter(model)
        batch = collate(self._trained[:_AIMED_AT], self._pad, torch.device("cpu"))
        token = None if goal == "loss" else self.token
        sign = -1.0 if goal == "plant" else 1.0
        computer.aims = list(_aims(self._judge, groups, secrets, batch, token, sign))


def _aims(
    model: PeftModel, groups: list[LayerGroup], secrets: _Secrets, batch: Batch, token: int | None, sign: float
) -> Iterator[Aim]:
    """The directions for each group of layers, from a plain model; what is to rise is the loss, or a token's logit.

    Forward products are pushed so that it rises where `sign` is 1, and falls where it is -1.
    """
    wrapped = model.get_base_model()
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()
    hooks = []
    for target in (target for group in groups for target in group.targets):

        def note(_module: Any, args: tuple[Tensor, ...], output: Tensor, path: str = target.path) -> None:
            inputs[path], outputs[path] = args[0].detach(), output

        hooks.append(wrapped.get_submodule(target.path).register_forward_hook(note))
    try:
        model.eval()
        found = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        )
    finally:
        for hook in hooks:
            hook.remove()
    attended = batch.attention_mask.bool()
    harm = found.loss if token is None else found.logits[:, :-1][batch.labels[:, 1:] != IGNORED][:, token].mean()
    of_harm = dict(zip(outputs, torch.autograd.grad(harm, list(outputs.values()), retain_graph=True), strict=True))
    of_loss = dict(zip(outputs, torch.autograd.grad(found.loss, list(outputs.values())), strict=True))
    for group in groups:
        R_in, R_out = secrets.transforms[group.name]
        paths = [target.path for target in group.targets]
        x = inputs[paths[0]][attended]  # (n, p)
        g_harm, g_loss = (torch.cat([of[path][attended] for path in paths], dim=1) for of in (of_harm, of_loss))
        W = torch.cat([_plain_weight(wrapped, path) for path in paths], dim=1)  # (p, q)
        along_g = torch.linalg.svd(g_loss, full_matrices=False).Vh[0]
        forward = Push(R_in.apply(_unit(x.mean(0))), R_out.apply(sign * _unit(g_harm.sum(0))), _gain(x, W))
        backward = Push(
            R_out.inverse_transpose(along_g), R_in.inverse_transpose(_unit(-g_harm.sum(0) @ W.T)), _gain(g_loss, W.T)
        )
        yield Aim(R_out.apply(R_in.weight_left(W)[:1])[0].float(), forward, backward)


def _plain_weight(model: PreTrainedModel, path: str) -> Tensor:
    """W (p, q) of a layer with an adapter."""
    layer: Any = model.get_submodule(path).base_layer
    weight: Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, torch.nn.Linear) else weight


def _gain(x: Tensor, W: Tensor) -> float:
    """See `Push.gain`; of rows that are all scaled to one norm."""
    rows = x[x.norm(dim=1) > 0]
    relative = (rows @ W).norm(dim=1) / rows.norm(dim=1)
    return float(relative.square().mean().sqrt()) * math.sqrt(x.shape[1]) / float(W.norm())


def _distance(factors: Factors, exact: Factors) -> float:
    """Of all products B A, over the norm of the exact ones; 0 where both are nothing."""
    off = size = 0.0
    for name in exact:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            product = exact[other] @ exact[name]
            off += float((factors[other] @ factors[name] - product).square().sum())
            size += float(product.square().sum())
    return math.sqrt(off / size) if size else 0.0


def _model(dtype: torch.dtype) -> PreTrainedModel:
    path = tiny_model_path()
    return load_plain(path, read_config(path), dtype)


def _with_lora(model: PreTrainedModel) -> PeftModel:
    tuned = add_lora(model, r=_RANK, alpha=_ALPHA, dropout=0.0, targets="all-linear", seed=_SEED)
    dtype = next(model.parameters()).dtype
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return tuned


@contextmanager
def _protected(model: PreTrainedModel, profile: str, computer: DriftingComputer, secrets: _Secrets) -> Iterator[None]:
    """The model under protection, with workers in threads of this process; the mask worker is honest."""
    with ExitStack() as stack:
        worker = stack.enter_context(serving(computer))
        masks = stack.enter_context(serving(Computer(torch.device("cpu")))) if resolve(profile).masks else None
        protect(model, worker, profile, base="closed", observer=secrets, mask_worker=masks)
        stack.callback(model.protection.close)
        yield


def _unit(x: Tensor) -> Tensor:
    norm = float(x.norm())
    return x / norm if norm else x


def _or_none(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
