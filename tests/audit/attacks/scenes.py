"""Small worlds in which it is known what an attack must find: transcripts made without a model, a worker or a network.

A world has tokens with embeddings of their own, four layers (two of which read the residual stream), training steps,
prompts in families, and decoding. `Scheme`s of several strengths hide it; `noise` shows the worker nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker
from obfuscatune.audit.attacks.geometry import second_moment
from obfuscatune.audit.attacks.knowledge import Architecture, Knowledge, KnownCall, PublicBase, PublicText, Scheme
from obfuscatune.audit.attacks.scoring import TrueCall, TrueLayer, Truth
from obfuscatune.audit.attacks.stealing import losses
from obfuscatune.audit.attacks.view import Factors, HeldAdapter, HeldStep, SeenCall, SeenMatrix, WorkerView
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.masks import DEVIATION, GRID
from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.protocol.payloads import Method, Part, Slice, Step

P = 72  # the smallest width at which a structured transform has a grid: 8 x 9
VOCABULARY = 40
SHAPES = ((P, 2 * P), (P, P), (P, 2 * P), (2 * P, P))
STEPS = 12
SHARPNESS = 2.5
"""Of the next token's distribution: standard deviation of the logits."""


@dataclass(frozen=True)
class Hiding:
    """How a world is hidden."""

    transform: str = "haar"
    output: str = "haar"
    mixing: bool = True
    shield_rows: int = 4
    loudness: float = 1.0
    heavy_tailed: bool = False
    permuted: bool = False
    noise: bool = False
    drift: float = 0.05
    training: int = 12
    prompt: int = 8
    """Tokens of an example, and of a prompt."""
    equal_lengths: bool = False
    """Whether all tokens' rows are of one length."""
    context: float = 0.0
    """How much of a row follows from its place in the text and not from its token."""
    spread: float = 1.0
    """How unlike the features are in size: logarithm, either way."""
    adapted: bool = False
    """Whether adapters lie on the worker."""
    masks: Masks = "none"


Masks = Literal["none", "once", "reused", "coarse", "narrow"]
"""What lies over rows: nothing; one-time masks; one for each two calls, multiples of 8 instead of the grid, or
nothing along a third of the directions."""


CLEAR = Hiding("identity", "identity", mixing=False, shield_rows=0)
ROTATED = Hiding(mixing=False, shield_rows=0)
MIXED = Hiding()
STRUCTURED = Hiding("structured", "structured", mixing=False, shield_rows=0)
ONE_SIDED = Hiding(output="identity")
FAR = replace(ONE_SIDED, drift=0.15)
IN_CONTEXT = replace(MIXED, context=0.5)
LONG_IN_CONTEXT = replace(IN_CONTEXT, training=100)
ROTATED_IN_CONTEXT = replace(ROTATED, context=0.5)
UNLIKE = replace(STRUCTURED, spread=3.0)
PERMUTED = replace(CLEAR, permuted=True)
UNROTATED = Hiding("identity", "identity", shield_rows=2, heavy_tailed=True)
EQUALLY_LONG = replace(ROTATED, equal_lengths=True)
FILLED = Hiding(shield_rows=36, loudness=8.0, training=36, prompt=36)
ADAPTED = Hiding(output="identity", mixing=False, shield_rows=0, adapted=True)
REUSED, COARSE, NARROW, ONCE = (replace(MIXED, masks=masks) for masks in ("reused", "coarse", "narrow", "once"))
NOISE = Hiding("structured", "structured", noise=True, adapted=True)


@dataclass(frozen=True)
class World:
    """A transcript, what was true, and every kind of knowledge."""

    view: WorkerView
    truth: Truth
    knowledge: dict[Attacker, Knowledge]


class Toy(torch.nn.Module):
    """The world's language model: the next token from the last one, through the layers. All but these is known."""

    def __init__(self, table: Tensor, head: Tensor, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.table, self.head = table, head
        self.layers = torch.nn.ParameterList([W.clone() for W in weights])
        self.bias = torch.nn.Parameter(torch.zeros(len(table), dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(self.table[ids], dim=-1) * P**0.5
        x = x + torch.tanh(x @ self.layers[1])
        x = torch.tanh(x @ self.layers[2]) @ self.layers[3]
        logits: Tensor = SHARPNESS * torch.nn.functional.normalize(x, dim=-1) @ self.head.T + self.bias
        return logits

    def drawn_again(self, seed: int) -> Toy:
        random = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(W.shape, generator=random, dtype=W.dtype) for W in self.layers]
        return Toy(self.table, self.head, drawn)

    def place(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return {f"layers.{layer}": W for layer, W in enumerate(weights)}


class _Builder:
    def __init__(self, hiding: Hiding, seed: int) -> None:
        self.hiding = hiding
        self.random = torch.Generator().manual_seed(seed)
        longest = 0.5 if hiding.equal_lengths else 2.0
        lengths = torch.linspace(0.5, longest, VOCABULARY, dtype=torch.float64)[:, None]
        table = self.normal(VOCABULARY, P) + 0.5 * self.normal(1, P)
        if hiding.heavy_tailed:
            table = table.pow(5)
        scales = torch.linspace(hiding.spread, -hiding.spread, P, dtype=torch.float64).exp()
        self.table = lengths * torch.nn.functional.normalize(table * scales, dim=1) * P**0.5
        self.bases = [self.weight(p, q) for p, q in SHAPES]
        self.weights = [W + hiding.drift * W.norm() / (W.numel() ** 0.5) * self.normal(*W.shape) for W in self.bases]
        key = RootKey.generate() if seed < 0 else RootKey(bytes([seed % 256]) * 32)
        self.R_in, self.R_out = [], []
        for layer, (p, q) in enumerate(SHAPES):
            for kind, dim, into in ((hiding.transform, p, self.R_in), (hiding.output, q, self.R_out)):
                transform = TransformSpec.parse(kind).make(dim, key.stream("scene", layer, len(into), kind))
                R = transform.apply(torch.eye(dim, dtype=torch.float64))
                if hiding.permuted and into is self.R_in:
                    R = torch.eye(dim, dtype=torch.float64)[torch.randperm(dim, generator=self.random)]
                into.append(R)
        self.stars = [R_in.T @ W @ R_out for R_in, W, R_out in zip(self.R_in, self.weights, self.R_out, strict=True)]
        if hiding.noise:
            self.stars = [self.normal(*W.shape) for W in self.weights]
        self.head = self.normal(VOCABULARY, P)
        self.model = Toy(self.table, self.head, self.weights)
        with torch.no_grad():
            self.chain = self.model(torch.arange(VOCABULARY)[:, None])[:, 0].softmax(1)
        self.deltas: list[Tensor | None] = []
        self.adapters = [self.adapter(layer, p, q) for layer, (p, q) in enumerate(SHAPES)]
        self.steps: list[HeldStep] = []
        self.passes = 1
        self.mask = torch.empty(0)
        self.seen: list[SeenCall] = []
        self.true: list[TrueCall] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def weight(self, p: int, q: int) -> Tensor:
        """With a falling spectrum, as trained ones have."""
        U, _, Vh = torch.linalg.svd(self.normal(p, q), full_matrices=False)
        return U * torch.linspace(3.0, 0.3, min(p, q), dtype=torch.float64) @ Vh

    def adapter(self, layer: int, p: int, q: int) -> HeldAdapter:
        """One of rank 4 for each half of the first layer's columns, and one for every other layer."""
        widths = (q // 2, q // 2) if layer == 0 else (q,)
        slices = tuple(Slice(sum(widths[:index]), width, 4, 2.0, 0.0) for index, width in enumerate(widths))
        R_in, R_out = self.R_in[layer], self.R_out[layer]
        factors: Factors = {}
        for index, it in enumerate(slices):
            factors[index, Part.A] = self.normal(p, it.rank)
            factors[index, Part.B] = 0.1 * self.normal(it.rank, it.width)
        adapter = HeldAdapter(layer, 0, slices, factors, factors)
        self.deltas.append(adapter.delta(q))
        if not self.hiding.noise:
            sides = [R_out if len(widths) == 1 else torch.eye(width, dtype=torch.float64) for width in widths]
            for index, side in enumerate(sides):
                factors[index, Part.A] = R_in.T @ factors[index, Part.A]
                factors[index, Part.B] = factors[index, Part.B] @ side
        else:
            factors.update({key: self.normal(*factor.shape) for key, factor in factors.items()})
        return adapter

    def text(self, length: int) -> tuple[int, ...]:
        token = int(torch.randint(VOCABULARY, (1,), generator=self.random))
        tokens = [token]
        for _ in range(length - 1):
            token = int(torch.multinomial(self.chain[token], 1, generator=self.random))
            tokens.append(token)
        return tuple(tokens)

    def inputs(self, tokens: tuple[int, ...]) -> list[Tensor]:
        """Rows of each layer: of the residual stream twice, and two that are something else."""
        rows = self.table[list(tokens)]
        rows = rows + self.hiding.context * rows.square().mean().sqrt() * self.normal(*rows.shape)
        return [rows, torch.tanh(rows @ self.bases[1]), rows, torch.tanh(rows @ self.bases[2])]

    def pass_over(self, tokens: tuple[int, ...], phase: str, text: int) -> None:
        inputs = self.inputs(tokens)
        for layer, rows in enumerate(inputs):
            self.cross(layer, False, rows, tokens, phase, text)
        if phase == "training":
            for layer in reversed(range(0 if self.hiding.adapted else 1, len(SHAPES))):
                g = self.normal(len(tokens), SHAPES[layer][1])
                if layer == len(SHAPES) - 1:  # of cross-entropy: less of the token that follows, more of all others
                    g = self.head.mean(0) - self.head[list(tokens[1:] + tokens[:1])] + 0.1 * g
                self.cross(layer, True, g, tokens, phase, text)
            settings = Step(Method.SGD, len(self.steps) + 1, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
            self.steps.append(HeldStep(len(self.seen), settings))
            self.passes += 1

    def cross(self, layer: int, transposed: bool, rows: Tensor, tokens: tuple[int, ...], phase: str, text: int) -> None:
        hiding = self.hiding
        sent = rows @ (self.R_out if transposed else self.R_in)[layer]
        if hiding.mixing:
            scale = hiding.loudness * rows.square().mean().sqrt()
            sent = torch.cat([sent, scale * self.normal(hiding.shield_rows, sent.shape[1])])
            sent = torch.linalg.qr(self.normal(len(sent), len(sent)))[0] @ sent
        if hiding.noise:
            sent = self.normal(*sent.shape)
        if hiding.masks != "none":
            sent = GRID * (sent / sent.square().mean().sqrt() / GRID).round() + self.drawn(*sent.shape)
        awaited = round(1e4 * (1 + 0.05 * len(tokens)) * float(self.normal(1).mul(0.1).exp()))
        self.seen.append(SeenCall(len(self.seen), layer, layer, transposed, sent, awaited, self.passes))
        self.true.append(TrueCall(layer, transposed, rows, tokens, phase, text, 0))  # type: ignore[arg-type]

    def drawn(self, rows: int, width: int) -> Tensor:
        """r (rows, width), multiples of the grid."""
        kind, grid = self.hiding.masks, 8.0 if self.hiding.masks == "coarse" else GRID
        if kind == "reused" and self.mask.shape == (rows, width):
            again, self.mask = self.mask, torch.empty(0)
            return again
        self.mask = (DEVIATION * self.normal(rows, width) / grid).floor() * grid
        if kind == "narrow":
            self.mask[:, : width // 3] = 0
        return self.mask

    def build(self) -> World:
        examples = [self.text(self.hiding.training) for _ in range(12)]
        for _epoch in range(2):
            for number, example in enumerate(examples):
                self.pass_over(example, "training", number)
        for family in range(6):
            beginning = self.text(self.hiding.prompt // 2)
            for member in range(3):
                number = 3 * family + member
                self.pass_over(beginning + self.text(self.hiding.prompt // 2), "prompt", number)
                for token in self.text(STEPS):
                    self.pass_over((token,), "decoding", number)
        matrices = tuple(SeenMatrix(W_star, layer) for layer, W_star in enumerate(self.stars))
        layers = tuple(
            TrueLayer(f"layer {n}", (R_in,), (R_out,))
            for n, (R_in, R_out) in enumerate(zip(self.R_in, self.R_out, strict=True))
        )
        pieces = tuple(f"t{token} " for token in range(VOCABULARY))
        view = WorkerView(matrices, tuple(self.seen), len(SHAPES))
        held_out = torch.tensor([self.text(self.hiding.training) for _ in range(100)])
        secret_losses = losses(self.model, held_out)
        truth = Truth(tuple(self.true), layers, self.weights, self.bases, pieces, (), held_out, secret_losses)
        if self.hiding.adapted:
            view = replace(view, adapters=tuple(self.adapters), steps=tuple(self.steps))
            truth = replace(truth, adapters=tuple(delta for delta in self.deltas if delta is not None))
        return World(view, truth, self.knowledge(truth))

    def knowledge(self, truth: Truth) -> dict[Attacker, Knowledge]:
        scheme = Scheme(self.hiding.mixing, self.hiding.shield_rows)
        texts = tuple(self.text(self.hiding.training) for _ in range(150))
        tokens = torch.tensor([token for one in texts for token in one])
        inputs = [torch.cat(rows) for rows in zip(*(self.inputs(one) for one in texts), strict=True)]
        covariances = {layer: second_moment(rows) for layer, rows in enumerate(inputs)}
        base = PublicBase(self.bases, inputs[0], covariances, tokens, self.head, lambda ids: self.table[ids])
        known = [
            KnownCall(index, call.rows)
            for index, call in enumerate(truth.calls)
            if call.phase == "training" and call.layer == 0 and not call.transposed
        ][:16]
        trained = [call.tokens for call in truth.calls if call.phase == "training"]
        text = PublicText(texts, VOCABULARY)
        how = Architecture(self.model.drawn_again, lambda: Toy(self.table, self.head, self.bases), self.model.place)
        return {
            Attacker.CLOSED: Knowledge(Attacker.CLOSED, scheme),
            Attacker.PUBLIC_TEXT: Knowledge(Attacker.PUBLIC_TEXT, scheme, text, how),
            Attacker.PUBLIC_BASE: Knowledge(
                Attacker.PUBLIC_BASE, scheme, text, how, base, documents=tuple(sorted({*trained, *texts[:24]}))
            ),
            Attacker.KNOWN_PLAINTEXT: Knowledge(Attacker.KNOWN_PLAINTEXT, scheme, plaintext=tuple(known)),
        }


@lru_cache(maxsize=16)
def world(hiding: Hiding, seed: int = 0) -> World:
    """The world of that seed, hidden that way."""
    return _Builder(hiding, seed).build()
