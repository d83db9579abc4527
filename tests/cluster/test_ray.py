"""A real Ray cluster on this machine: up, fine-tuning, the death of a worker and of an actor, down.

`make test-ray` runs it, with RAY_PYTHON naming the Python of an environment that has Ray. This process, and the
enclave's that it starts, have none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from obfuscatune.assets import clinic_notes_path
from tests.cluster.fleets import SECONDS, Up, fleet, make_enclave, up

RAY_PYTHON = os.environ.get("RAY_PYTHON")
ROOT = Path(__file__).parents[2]
# float32: losses of protected and plain runs differ by rounding, which the steps before have amplified.
LOSS_TOLERANCE = 1e-4
STEPS = 60

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(RAY_PYTHON is None, reason="RAY_PYTHON names no environment with Ray: make test-ray"),
]


@dataclass(frozen=True)
class Cluster:
    python: str
    address: str
    env: dict[str, str]

    def run(self, program: str) -> str:
        """What a program prints that is connected to the cluster."""
        command = [self.python, "-c", f"import ray\nray.init({self.address!r}, namespace='obfuscatune')\n{program}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert RAY_PYTHON is not None
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    paths = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = ["--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "4", "--temp-dir", folder]
        small = ["--object-store-memory", "80000000", "--include-dashboard", "false", "--disable-usage-stats"]
        process = subprocess.Popen(
            [str(Path(RAY_PYTHON).with_name("ray")), "start", "--head", "--block", *options, *small],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "Ray runtime started" in line:
                    break
            assert process.poll() is None, "".join(lines)
            yield Cluster(RAY_PYTHON, f"127.0.0.1:{port}", env)
        finally:
            process.terminate()  # with --block, Ray's own processes end with it
            process.communicate(timeout=SECONDS)


@contextmanager
def ray_fleet(cluster: Cluster, state: Path, enclave: Path, *more: str) -> Iterator[Up]:
    options = ("--engine", "ray", "--address", cluster.address, "--listen", "127.0.0.1", "--memory", "256MiB")
    with up(state, enclave, *options, *more, python=(cluster.python,), env=cluster.env) as running:
        yield running


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def losses(out: Path) -> list[float]:
    try:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line["loss"] for line in lines if "loss" in line]


def finetune(out: Path, *options: str) -> subprocess.Popen[str]:
    """Fine-tuning in an environment without Ray."""
    data = ["--data", str(clinic_notes_path() / "train.jsonl"), "--out", str(out)]
    steps = ["--max-steps", str(STEPS), "--batch-size", "2", "--checkpoint-every", "1000", "--seed", "5"]
    return subprocess.Popen(
        [sys.executable, "-m", "obfuscatune", "finetune", *data, *steps, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def pid_listening(address: str) -> int:
    """The worker process that was started to listen at an address."""
    port = address.rpartition(":")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"obfuscatune.worker" in words and any(it.endswith(b":" + port.encode()) for it in words):
            return int(folder.name)
    raise AssertionError(f"no worker at {address}")


def keys(state: Path) -> set[str]:
    return {it["key"] for it in fleet("status", "--state", str(state))["members"]}


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_run_outlives_a_worker_and_an_actor(cluster: Cluster, tmp_path: Path) -> None:
    state, enclave, out = tmp_path / "state", make_enclave(tmp_path / "enclave"), tmp_path / "run"
    with ray_fleet(cluster, state, enclave, "--workers", "2", "--operator", "cloud-a") as running:
        policy = {"cloud-a": {"party": "compute", "authority": str(state / "authority" / "cert.pem")}}
        file = tmp_path / "fleet.yaml"
        file.write_text(yaml.safe_dump({"discover": running.ready["url"], "operators": policy}))
        members = fleet("status", "--state", str(state))["members"]
        identity = ("--tls-cert", str(enclave / "cert.pem"), "--tls-key", str(enclave / "key.pem"))
        process = finetune(out, "--fleet", str(file), *identity)
        try:
            wait_until(lambda: len(losses(out)) >= 3 or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1]
            assert "/site-packages/torch/" in maps_of(process.pid)
            assert "/site-packages/ray/" not in maps_of(process.pid)
            os.kill(pid_listening(members[0]["address"]), signal.SIGKILL)
            running.wait_for("restarts: 1")
            cluster.run("ray.kill(ray.get_actor('obfuscatune-1'), no_restart=False)")
            wait_until(lambda: keys(state) != {it["key"] for it in members})
            before = len(losses(out))
            wait_until(lambda: len(losses(out)) > before or process.poll() is not None)
            _, told = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, told
        finally:
            process.kill()
            process.communicate()
        assert len(losses(out)) == STEPS
        pids = [pid_listening(it["address"]) for it in fleet("status", "--state", str(state))["members"]]
        assert fleet("down", "--state", str(state), python=cluster.python, env=cluster.env)["supervisor_stopped"]
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert "none" in cluster.run("print(ray.util.list_named_actors() or 'none')")
    with finetune(tmp_path / "plain", "--plain") as process:
        _, told = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, told
    assert losses(out) == pytest.approx(losses(tmp_path / "plain"), abs=LOSS_TOLERANCE)


def test_workers_are_left_running_and_taken_over(cluster: Cluster, tmp_path: Path) -> None:
    state, enclave = tmp_path / "state", make_enclave(tmp_path / "enclave")
    with ray_fleet(cluster, state, enclave, "--leave-running", "--name", "second"):
        (before,) = fleet("status", "--state", str(state))["members"]
    with ray_fleet(cluster, state, enclave, "--leave-running", "--name", "second"):
        assert fleet("status", "--state", str(state))["members"] == [before]
    ended = fleet("down", "--state", str(state), python=cluster.python, env=cluster.env)
    assert ended == {"supervisor_stopped": False, "actors_ended": 1}
    wait_until(lambda: "none" in cluster.run("print(ray.util.list_named_actors() or 'none')"))
