"""The search of one scene: canaries of data, adapter and base model, in all that left the enclave; and its controls."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from obfuscatune.demo.parties import canaries
from obfuscatune.demo.parties.canaries import Found, Search
from obfuscatune.demo.parties.machines import Machine
from obfuscatune.demo.parties.programs import Server, run
from obfuscatune.demo.parties.result import Searched
from obfuscatune.demo.parties.stage import Stage

DATA, ADAPTER, BASE = "data", "adapter", "base model"
_WEIGHTS = "model.safetensors"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  read, not written


def make_search(stage: Stage) -> Search:
    """What must be found nowhere: of the notes, of the provider's weights, and of the adapter where it came home."""
    tokenizer = Tokenizer.from_file(str(stage.model / "tokenizer.json"))
    texts = [*stage.known, *stage.codes, *stage.codes.values()]
    found = [*canaries.of_text(DATA, texts)]
    found += canaries.of_tokens(DATA, [tokenizer.encode(it, add_special_tokens=False).ids for it in texts])
    found += canaries.of_tensors(BASE, canaries.tensors_of(stage.model / _WEIGHTS))
    adapter = stage["alice"].folder / "adapter" / _ADAPTER_WEIGHTS
    if adapter.exists():
        found += canaries.of_tensors(ADAPTER, canaries.tensors_of(adapter))
    return Search(found)


def search_all(stage: Stage, search: Search) -> Iterator[Searched]:
    """Everything that left the enclave, place by place. To be called after its programs have ended."""
    cloud, network = stage["cloud"].folder, stage.network
    yield _searched("the cloud's disk: state, bundles, logs, /tmp", search, [cloud])
    yield _searched("the network: every byte between the parties", search, [network])
    yield _searched("the workers: transcripts and logs", search, [stage["worker"].folder, *stage.transcripts()[1:]])
    others = [stage[name].folder for name in ("bob", "mallory")]
    yield _searched("bob and mallory, and what `ps` shows", search, others)
    if _SHARED_MEMORY.is_dir():
        yield _searched("shared memory", search, [_SHARED_MEMORY])


def controls(stage: Stage, search: Search) -> Iterator[Searched]:
    """The same search where nothing is sealed: it must find."""
    yield _searched("alice's notes", search, [stage.data], is_control=True)
    yield _searched("the provider's model", search, [stage.model], is_control=True)
    adapter = stage["alice"].folder / "adapter"
    if not adapter.exists():
        return
    yield _searched("alice's adapter", search, [adapter], is_control=True)
    tensors = canaries.tensors_of(adapter / _ADAPTER_WEIGHTS)
    for dtype in (torch.float16, torch.bfloat16):
        half = b"".join(it.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for it in tensors.values())
        found = _counted([Found("", it.kind, it.what) for it in search.in_bytes(half)])
        name = str(dtype).removeprefix("torch.")
        yield Searched(f"control: alice's adapter in {name}", len(half) / 1e6, found, is_control=True)


def unprotected_transcript(stage: Stage, machine: Machine, search: Search) -> Searched:
    """A control: what workers see of a model that is not transformed, as `--public-base` allows for published ones."""
    folder = machine.folder / "unprotected"
    folder.mkdir()
    names = ("compute", "mask")
    arguments = {it: ("worker", "--listen", "tcp:127.0.0.1:0", "--record", folder / it, "--json") for it in names}
    with Server(machine, "compute", *arguments["compute"]) as one, Server(machine, "mask", *arguments["mask"]) as other:
        at, masked_at = (json.loads(server.lines_until("{"))["address"] for server in (one, other))
        model = ("--model", stage.model, "--profile", "guarded", "--public-base", "--max-new-tokens", 1)
        workers = ("--worker", at, "--mask-worker", masked_at)
        run(machine, "generate", *model, *workers, "--prompt", "Once upon a time")
    found = _searched("transcripts of an untransformed model", search, [folder], is_control=True)
    shutil.rmtree(folder)
    return found


def _searched(place: str, search: Search, paths: list[Path], *, is_control: bool = False) -> Searched:
    before = search.searched
    found: list[Found] = []
    for path in paths:
        found += search.in_file(path, path.name) if path.is_file() else search.below(path) if path.exists() else []
    name = f"control: {place}" if is_control else place
    return Searched(name, (search.searched - before) / 1e6, _counted(found), is_control)


def _counted(found: list[Found]) -> dict[str, int]:
    counts = dict.fromkeys((DATA, ADAPTER, BASE), 0)
    for it in found:
        counts[it.kind] += 1
    return counts
