"""Cores and memory of a container, and not of its host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from obfuscatune import machine
from obfuscatune.machine import Limits, container_limits
from obfuscatune.protocol.limits import GIB
from obfuscatune.worker.options import WorkerOptions
from obfuscatune.worker.server import DEFAULT_QUOTA, _quota

NONE = Limits(None, None)


def system(root: Path, *, own: str, mounted: str = "/", mount: str = "/sys/fs/cgroup", **files: str) -> Path:
    """A root directory as Linux shows it. `files`: contents by path below the mount, `__` for /, `_` for a dot."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/else\n0::{own}\n")
    (root / "proc/self/mountinfo").write_text(
        "24 1 0:22 / /proc rw,relatime shared:5 - proc proc rw\n"
        f"30 24 0:26 {mounted} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    for name, content in files.items():
        path = root / mount.lstrip("/") / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def test_in_a_container(tmp_path: Path) -> None:
    """Its own group is the root of what it sees."""
    root = system(tmp_path, own="/", cpu_max="250000 100000", memory_max=str(3 * GIB))
    assert container_limits(root) == Limits(2.5, 3 * GIB)


def test_the_smallest_limit_of_all_groups_around_it_counts(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        own="/system/job/step",
        system__cpu_max="400000 100000",
        system__memory_max="max",
        system__job__cpu_max="150000 50000",
        system__job__memory_max=str(2 * GIB),
        system__job__step__cpu_max="max 100000",
        system__job__step__memory_max=str(5 * GIB),
    )
    assert container_limits(root) == Limits(3.0, 2 * GIB)


@pytest.mark.parametrize(
    ("own", "mounted"), [("/docker/1", "/docker/1"), ("/docker/1/inner", "/docker/1"), ("/../else", "/")]
)
def test_a_group_that_is_mounted_from_within(tmp_path: Path, own: str, mounted: str) -> None:
    root = system(tmp_path, own=own, mounted=mounted, mount="/cg", cpu_max="100000 100000", memory_max="max")
    assert container_limits(root) == Limits(1.0, None)


def test_a_group_that_a_sandbox_shows_without_naming_its_kind(tmp_path: Path) -> None:
    root = system(tmp_path, own="/", cpu_max="100000 100000", memory_max=str(GIB))
    table = root / "proc/self/mountinfo"
    table.write_text(table.read_text().replace("cgroup2", "tmpfs"))
    assert container_limits(root) == Limits(1.0, GIB)


@pytest.mark.parametrize("cpu", ["max 100000", "", "junk", "100 0", "-1 100000"])
def test_no_limit(tmp_path: Path, cpu: str) -> None:
    assert container_limits(system(tmp_path, own="/", cpu_max=cpu, memory_max="max")) == NONE
    assert container_limits(tmp_path / "no linux") == NONE


def test_cores_and_memory_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for limit, cores in ((2.0, 2), (1.5, 2), (0.1, 1), (100.0, 64), (None, 64)):
        monkeypatch.setattr(machine, "container_limits", lambda limit=limit: Limits(limit, 2**20))
        assert machine.cores() == cores
    assert machine.memory_bytes() == 2**20
    assert _quota(WorkerOptions("unix:/x"), "evict", 1).total == int(2**20 * DEFAULT_QUOTA)
    monkeypatch.setattr(machine, "container_limits", lambda: NONE)
    assert machine.memory_bytes() > 2**20
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores() == os.cpu_count()


@pytest.mark.long
def test_torch_starts_no_more_threads_than_the_container_has_cores() -> None:
    script = """
import os
from obfuscatune import machine, process
os.sched_getaffinity = lambda _: set(range(64))
process.container_limits = machine.container_limits = lambda: machine.Limits(0.5, None)
process.settle_process()
import torch
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for own, expected in ({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2"):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment | own, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]
