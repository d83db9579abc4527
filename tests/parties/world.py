"""Three parties in real processes on one machine: a provider, owners, a cloud with an enclave and workers.

Everything goes through the command line, as people do it; evidence is simulated.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from obfuscatune.assets import tiny_model_path
from obfuscatune.attest.policy import Policy
from obfuscatune.channel.identity import Identity
from obfuscatune.client.connection import Service, connect
from obfuscatune.protocol.addresses import TcpAddress, parse_address

COMMAND = (sys.executable, "-m", "obfuscatune")
MODEL = "notes-base"
ENVIRONMENT = {
    name: os.environ[name]
    for name in ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TMPDIR")
    if name in os.environ
}


def run(*arguments: object, fails: bool = False, quiet: bool = False, seconds: float = 120) -> str:
    """One command to its end; what it said. `fails`: it must. `quiet`: what it said on stdout alone."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=seconds
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said
    return done.stdout if quiet else said


class World:
    """`root` holds a directory for each party; the cloud's is what the cloud's owner sees. `model`: what is sealed."""

    def __init__(
        self, root: Path, owners: Sequence[str] = ("alice", "bob"), *, model: Path | None = None, **settings: object
    ) -> None:
        self.root, self.cloud = root, root / "cloud"
        self.cloud.mkdir()
        for name in ("provider", *owners):
            run("keygen", "--out", root / name, "--name", name)
        run("keygen", "--out", root / "platform")
        self.owners = {name: Identity.load(root / name) for name in owners}
        self.socket = Path(tempfile.mkdtemp(prefix="w-")) / "s"
        self.bundle = self.cloud / "bundles" / "base"
        self.bundle.parent.mkdir()
        run(
            "provider",
            "seal",
            model or tiny_model_path(),
            "-o",
            self.bundle,
            "--identity",
            root / "provider",
            "--key-out",
            self.key,
        )
        self.configuration = self.cloud / "service.yaml"
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._ports = {"listen": 0, "channel": 0, "operator": 0}
        self._settings = settings

    @property
    def key(self) -> Path:
        """The provider's key of his bundle."""
        return self.root / "provider" / "base.key"

    @contextmanager
    def running(self) -> Iterator["World"]:
        """Within it worker and service run, and the model is granted."""
        try:
            self.start_worker()
            self.start_service()
            self.grant()
            yield self
        finally:
            for name in ("service", *self._workers):
                self.stop(name)

    def start_worker(self) -> None:
        for name in self._workers:
            self._processes[name] = _start("worker", "--listen", self._address(name), until="ready at")

    @property
    def _workers(self) -> tuple[str, ...]:
        return ("worker", "mask_worker") if self._settings.get("profile") == "guarded" else ("worker",)

    def _address(self, worker: str) -> str:
        return f"unix:{self.socket.with_name(worker)}"

    def start_service(self) -> None:
        """Start the service; the first time on free ports, which it keeps."""
        settings = {
            **{name: f"127.0.0.1:{port}" for name, port in self._ports.items()},
            "state": str(self.cloud / "state"),
            **{name: {"address": self._address(name)} for name in self._workers},
            "attestation": {"producer": "simulated", "key_file": str(self.root / "platform" / "key.pem")},
            "bundles": [str(self.cloud / "bundles")],
            **self._settings,
        }
        self.configuration.write_text(yaml.safe_dump(settings))
        arguments = ("serve", "--config", str(self.configuration), "--json")
        process = _start(*arguments, log=self.cloud / "service.log")
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, (self.cloud / "service.log").read_text()
            said += line
        where = json.loads(said)
        for name, told in {"listen": "api", "channel": "channel", "operator": "operator"}.items():
            self._ports[name] = int(where[told].rpartition(":")[2])
        self.console: str = where["console"]
        self._processes["service"] = process
        platform = Identity.load(self.root / "platform").key.public_key().public_bytes_raw().hex()
        policy = {
            "version": 1,
            "require": [["simulated"]],
            "allow_simulated": True,
            "simulated": {"keys": [platform]},
            **json.loads(run("serve", "--config", self.configuration, "--check", "--json", quiet=True)),
        }
        (self.root / "policy.yaml").write_text(yaml.safe_dump(policy))

    def grant(self, *more: object) -> str:
        """The provider grants the model to all owners."""
        owners = [part for name in self.owners for part in ("--owner", self.root / name / "cert.pem")]
        where = ("--bundle", self.bundle, "--key-file", self.key, "--name", MODEL, "--until", "2099-01-01")
        return run("provider", "grant", *self.options("provider"), *where, *owners, *more)

    def options(self, party: str) -> tuple[object, ...]:
        """Of the party's commands: which enclave, which policy, who."""
        where = f"127.0.0.1:{self._ports['channel']}"
        return ("--enclave", where, "--policy", self.root / "policy.yaml", "--identity", self.root / party)

    @contextmanager
    def proxy(self, owner: str) -> Iterator[str]:
        """The owner's proxy; what OPENAI_BASE_URL is to be."""
        process = _start("owner", "proxy", *map(str, self.options(owner)), "--port", "0", log=self.root / "proxy.log")
        try:
            line = process.stdout.readline()
            assert line.startswith("OPENAI_BASE_URL="), (self.root / "proxy.log").read_text()
            yield line.strip().removeprefix("OPENAI_BASE_URL=")
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()

    @property
    def channel(self) -> TcpAddress:
        address = parse_address(f"tcp:127.0.0.1:{self._ports['channel']}")
        assert isinstance(address, TcpAddress)
        return address

    @property
    def operator_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['operator']}"

    @contextmanager
    def service(self, owner: str) -> Iterator[Service]:
        """The service as one of the owners has it: verified, with his key."""
        with connect(self.channel, self.owners[owner], Policy.from_file(self.root / "policy.yaml")) as service:
            yield service

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def kill(self, name: str) -> None:
        """As the machine's owner does: no warning."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._ended(name)

    def stop(self, name: str) -> int | None:
        """SIGTERM, and the exit code."""
        process = self._processes.get(name)
        if process is None:
            return None
        process.terminate()
        return self._ended(name)

    def _ended(self, name: str) -> int:
        process = self._processes.pop(name)
        code = process.wait(60)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return code


def _start(*arguments: str, until: str | None = None, log: Path | None = None) -> subprocess.Popen[str]:
    """Start a command; with `until`, wait for a line that has it among what it says."""
    with log.open("a") if log else tempfile.TemporaryFile("a") as errors:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if until else errors,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    if until:
        for line in process.stdout:
            if until in line:
                break
        else:
            raise AssertionError(f"{arguments[0]} ended: {process.wait()}")
    return process
