"""What a worker saw of a training run, searched for everything that it must not see.

The searcher is held against a positive control: the same run with the identity for a transform and without mixing,
in which it finds every row of every kind.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import obfuscatune
from obfuscatune import local_worker
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.target_layers import LayerGroup, find_groups
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.transcript import FRAMES, INDEX, TranscriptEntry, read_transcript
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import KEY, protected, with_lora

TEXT = "Ada Quill, ward 7: 40 mg of veltrazine, twice a day."
STEPS = 2
FOUND = 0.999  # |cosine| from which a vector counts as found: the same but for its length and rounding
UNRELATED = 0.9  # the largest of 10^6 cosines of random directions in 48 dimensions is about 0.75
WIDTHS = {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 6, "num_key_value_heads": 6}
# Every matrix has 48 or more rows and columns, so that no two directions come close by chance.


@dataclass
class Captured:
    """What a plain run computes in one group of layers: name of the kind -> vectors (k, d)."""

    rows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def kinds(self) -> dict[str, Tensor]:
        """Kind -> all its vectors that are not zero."""
        joined = {kind: torch.cat(parts) for kind, parts in self.rows.items()}
        return {kind: rows[rows.norm(dim=1) > 0] for kind, rows in joined.items()}


def token_ids() -> Tensor:
    """The text, a token to a byte."""
    return torch.tensor([list(TEXT.encode())])


def base_model() -> Any:
    return ARCHITECTURES["llama"].build(torch.float64, vocab_size=128, **WIDTHS)


def train(model: Any) -> Any:
    """A few steps of LoRA on the text."""
    adapted = with_lora(model)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


@dataclass
class Plain:
    """The plain run, watched."""

    model: Any
    groups: dict[str, Captured]

    @classmethod
    def run(cls) -> Plain:
        """Train, and capture what enters and leaves each group of layers that would share a crossing."""
        model = base_model()
        groups = find_groups(model, 0)
        watched = [Watch(group) for group in groups]
        train(model)
        for watch, group in zip(watched, groups, strict=True):
            W = torch.cat([target.layer.weight.T for target in group.targets], dim=1)
            watch.captured.rows |= {"weight rows": [W.detach()], "weight columns": [W.detach().T]}
        return cls(model, {group.name: watch.captured for group, watch in zip(groups, watched, strict=True)})


class Watch:
    """Hooks on the layers of one group, which see what the one crossing in their place would carry."""

    def __init__(self, group: LayerGroup) -> None:
        self.captured = Captured()
        self._outputs: list[Tensor] = []
        self._gradients: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._count = len(group.targets)
        for slot, target in enumerate(group.targets):
            target.layer.register_forward_hook(self._forward)
            target.layer.register_full_backward_hook(partial(self._backward, slot))

    def _forward(self, _layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        self._outputs.append(output.detach())
        if len(self._outputs) == self._count:
            self._keep("inputs", inputs[0].detach())
            self._keep("outputs", torch.cat(self._outputs, dim=-1))
            self._outputs = []

    def _backward(self, slot: int, _layer: Any, to_input: tuple[Tensor | None], of_output: tuple[Tensor]) -> None:
        self._gradients[slot] = (to_input[0], of_output[0])
        if len(self._gradients) == self._count:
            ordered = [self._gradients[slot] for slot in range(self._count)]
            self._keep("output gradients", torch.cat([of_output for _, of_output in ordered], dim=-1))
            if to_input[0] is not None:
                self._keep("input gradients", sum(to for to, _ in ordered if to is not None))
            self._gradients = {}

    def _keep(self, kind: str, rows: Any) -> None:
        self.captured.rows[kind].append(rows.reshape(-1, rows.shape[-1]))


class Transcript:
    """One session's messages, and vectors looked for in them."""

    def __init__(self, entries: list[TranscriptEntry]) -> None:
        self._requests = [entry.tensor for entry in entries if entry.header.type is MessageType.MULTIPLY]
        self._vectors: dict[int, list[Tensor]] = defaultdict(list)
        for entry in entries:
            if entry.tensor is not None:
                self._vectors[entry.tensor.shape[1]].append(entry.tensor)
                if entry.header.type is MessageType.STORE:
                    self._vectors[entry.tensor.shape[0]].append(entry.tensor.T)

    def closeness(self, vectors: Tensor) -> Tensor:
        """For each of (k, d), the largest |cosine| with any vector of that length in the transcript: (k,)."""
        seen = normalize(torch.cat(self._vectors[vectors.shape[1]]), dim=1)
        return (normalize(vectors, dim=1) @ seen.T).abs().amax(dim=1)

    def requests(self) -> list[Tensor]:
        """The rows (m, p) that were sent to be multiplied, in order."""
        return [rows for rows in self._requests if rows is not None]


@dataclass
class Recorded:
    """Both runs, as one worker wrote them down."""

    protected: Transcript
    control: Transcript
    raw: bytes
    adapter: dict[str, Tensor]


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain.run()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """The training run twice, protected and laid open; each followed by two forward passes of the same input.

    Mixing is drawn from a fixed key, so that a failure comes back when the test is run again.
    """
    folder = tmp_path_factory.mktemp("record")
    numbers = itertools.count()
    drawn = pytest.MonkeyPatch()
    drawn.setattr(SecretStream, "fresh", lambda: KEY.stream("test", next(numbers)))
    open_to_all = {"transform": "identity", "mixing": False, "allow_unsafe": True}
    adapters = []
    with local_worker(threads=1, record=folder) as worker:
        for knobs in ({}, open_to_all):
            with protected(base_model(), worker, **knobs) as model:
                adapted = train(model)
                adapters.append({name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad})
                with torch.no_grad():
                    adapted(token_ids()), adapted(token_ids())
    drawn.undo()
    entries = list(read_transcript(folder))
    sessions = list(dict.fromkeys(entry.session for entry in entries))
    assert len(sessions) == 2
    first, second = (Transcript([entry for entry in entries if entry.session == name]) for name in sessions)
    raw = (folder / FRAMES).read_bytes() + (folder / INDEX).read_bytes()
    yield Recorded(first, second, raw, adapters[0])


KINDS = ("inputs", "outputs", "input gradients", "output gradients", "weight rows", "weight columns")


@pytest.mark.parametrize("kind", KINDS)
def test_the_control_shows_everything(recorded: Recorded, plain: Plain, kind: str) -> None:
    for name, captured in plain.groups.items():
        if "gradients" in kind and "layers.0.self_attn.q_proj" in name:
            continue  # nobody asks for the gradient of the embeddings
        assert recorded.control.closeness(captured.kinds()[kind]).min() > FOUND, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_worker_sees_no_such_row(recorded: Recorded, plain: Plain, kind: str) -> None:
    for name, captured in plain.groups.items():
        if kind in captured.kinds():
            assert recorded.protected.closeness(captured.kinds()[kind]).max() < UNRELATED, name


def vocabulary(plain: Plain) -> Tensor:
    """Every token's embedding as the first block's layers get it (v, p)."""
    with torch.no_grad():
        embedded = plain.model.model.embed_tokens.weight
        return plain.model.model.layers[0].input_layernorm(embedded)


def test_no_token_shows(recorded: Recorded, plain: Plain) -> None:
    """In the control the vocabulary names every token of the text, and no other; in the protected run none."""
    text = sorted(set(TEXT.encode()))
    named = (recorded.control.closeness(vocabulary(plain)) > FOUND).nonzero().flatten().tolist()
    assert named == text
    assert recorded.protected.closeness(vocabulary(plain)).max() < UNRELATED


def test_adapters_never_cross(recorded: Recorded) -> None:
    for run in (recorded.protected, recorded.control):
        factors = [factor if "lora_A" in name else factor.T for name, factor in recorded.adapter.items()]
        assert max(run.closeness(factor).max() for factor in factors) < UNRELATED


def test_the_same_input_twice_gives_unrelated_requests(recorded: Recorded) -> None:
    crossings = 8
    for run, same in ((recorded.protected, False), (recorded.control, True)):
        requests = run.requests()
        first, second = requests[-2 * crossings : -crossings], requests[-crossings:]
        for one, other in zip(first, second, strict=True):
            if same:
                torch.testing.assert_close(one, other, rtol=0, atol=0)
            else:  # rows of one activation lean the same way, so two mixtures of them may come near, but not meet
                assert (normalize(one, dim=1) @ normalize(other, dim=1).T).abs().max() < FOUND
                assert (one - other).norm() > one.norm()  # sqrt(2) times, were they independent


NAMES = ("llama", "model", "layers", "_proj", "lora_", "adapter", "weight", ".mlp.", "_attn", "embed", "private")
# Five bytes and more: among millions of random ones, three are found by chance now and then.


def test_no_text_no_names_no_keys(recorded: Recorded, plain: Plain) -> None:
    ids = token_ids().flatten()
    numbers = [ids.to(dtype).numpy().tobytes() for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)]
    words = [word.encode() for word in re.findall(r"\w{5,}", TEXT)]
    secrets = [KEY._key, KEY._key.hex().encode()]
    for needle in (*numbers, *words, *secrets, *(name.encode() for name in NAMES)):
        assert needle not in recorded.raw, needle
    weight = plain.model.model.layers[1].mlp.up_proj.weight.detach()
    gate_and_up = torch.cat([plain.model.model.layers[1].mlp.gate_proj.weight.detach(), weight]).T
    assert gate_and_up[3].numpy().tobytes() in recorded.raw  # of the control: such a search does find what is there


def test_every_request_has_shield_rows(recorded: Recorded) -> None:
    assert min(map(len, recorded.protected.requests())) >= token_ids().numel() + resolve("private").shield_rows
    assert {len(request) for request in recorded.control.requests()} == {token_ids().numel()}


UNTOUCHED = {
    "obfuscatune": ("torch", "transformers", "peft", "obfuscatune.enclave", "obfuscatune.worker"),
    "obfuscatune.worker.server": ("transformers", "peft", "obfuscatune.enclave", "obfuscatune.training", "safetensors"),
}


@pytest.mark.parametrize(("module", "absent"), UNTOUCHED.items(), ids=UNTOUCHED)
def test_imports_stay_on_their_side(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert module in loaded
    assert not [name for name in loaded if name in absent or name.startswith(tuple(f"{part}." for part in absent))]


@pytest.mark.parametrize("absent", ["enclave", "worker"])
def test_each_side_starts_without_the_files_of_the_other(absent: str, tmp_path: Path) -> None:
    source = Path(obfuscatune.__file__).parent
    shutil.copytree(source, tmp_path / "obfuscatune", ignore=shutil.ignore_patterns(absent, "assets", "__pycache__"))
    starts = {
        "enclave": "obfuscatune.worker.server",
        "worker": "obfuscatune.enclave.loading, obfuscatune.enclave.protect",
    }
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {starts[absent]}; print(obfuscatune.__file__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(tmp_path / "obfuscatune" / "__init__.py")
