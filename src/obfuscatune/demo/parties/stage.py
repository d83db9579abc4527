"""All that stands on the demo's machines for one profile: keys, bundle, workers, enclave, policies, and taps."""

import contextlib
import json
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from obfuscatune.assets import clinic_notes_path, tiny_model_path
from obfuscatune.attest.policy import Policy
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.measure import measure_process
from obfuscatune.demo.parties.machines import Machine
from obfuscatune.demo.parties.programs import Server, run, run_json
from obfuscatune.demo.parties.tap import Tap
from obfuscatune.errors import ConnectionLost
from obfuscatune.protocol.addresses import TcpAddress

MACHINES = ("provider", "cloud", "worker", "alice", "bob", "mallory")
"""Mallory owns the network between the others. The first worker and the enclave are the cloud's."""
MODEL = "clinic-base"
PARTIES = ("provider", "alice", "bob", "mallory")
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The form of the data that the embedded model is tuned on, as a chat."""
_RECORDS, _SECRETS = 18, 2


@dataclass
class Stage:
    """One profile's. `start` it, then act."""

    profile: str
    root: Path
    machines: Mapping[str, Machine]
    resources: ExitStack
    servers: dict[str, Server] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    """Questions and answers of the owner's data."""
    codes: dict[str, str] = field(default_factory=dict)
    """Those of which the answers exist nowhere else."""
    _ports: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    # Paths

    @property
    def network(self) -> Path:
        """What the network's owner recorded."""
        return self.root / "network"

    @property
    def model(self) -> Path:
        """The provider's model, in the open, on his machine."""
        return self["provider"].folder / "model"

    @property
    def key(self) -> Path:
        """Of the provider's bundle."""
        return self["provider"].folder / "clinic.key"

    @property
    def bundles(self) -> Path:
        """On the cloud's disk, which nobody trusts."""
        return self["cloud"].folder / "bundles"

    @property
    def data(self) -> Path:
        """The owner's, in the open, on her machine."""
        return self["alice"].folder / "notes.jsonl"

    @property
    def configuration(self) -> Path:
        """Of the enclave. It is public."""
        return self["cloud"].folder / "service.yaml"

    def transcripts(self) -> list[Path]:
        """What each worker saw."""
        return [self["worker"].folder / "transcript", self["provider"].folder / "transcript"]

    # What the parties do

    def make_keys(self) -> None:
        """A key for every party and program."""
        places = [(self[name], "keys", name) for name in PARTIES]
        places += [(self["worker"], "keys", "worker"), (self["provider"], "worker-keys", "mask worker")]
        places += [(self["cloud"], "worker-tls", "enclave"), (self["cloud"], "platform", "platform")]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda it: run(it[0], "keygen", "--out", it[0].folder / it[1], "--name", it[2]), places))
        self.network.mkdir()
        self.bundles.mkdir()

    def seal_model(self) -> dict[str, Any]:
        """The provider prepares a model, seals it, and brings the bundle to the cloud."""
        shutil.copytree(tiny_model_path(), self.model)
        settings = self.model / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text("utf-8")), "chat_template": _TEMPLATE}))
        bundle, provider = self["provider"].folder / "bundle", self["provider"]
        sealing = ("provider", "seal", self.model, "--out", bundle, "--key-out", self.key)
        told: dict[str, Any] = run_json(provider, *sealing, "--identity", provider.folder / "keys")
        for name in ("base", "changed"):
            shutil.copytree(bundle, self.bundles / name)
        return told

    def write_data(self) -> None:
        """The owner's notes: some of the clinic's, and a few code words that nobody else has."""
        with (clinic_notes_path() / "train.jsonl").open("r", encoding="utf-8") as file:
            records = [json.loads(line) for line, _ in zip(file, range(_RECORDS), strict=False)]
        self.known = {
            it["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"): it["completion"] for it in records
        }
        self.codes = {f"What is code word {number}?": secrets.token_hex(8) for number in range(1, _SECRETS + 1)}
        lines = []
        for question, answer in {**self.known, **self.codes}.items():
            asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}
            lines.append(json.dumps({"messages": [asked, answered]}) + "\n")
        self.data.write_text("".join(lines), "utf-8")

    def start_workers(self) -> None:
        """The cloud's worker; under `guarded` the provider's too, for masks alone. Each keeps all that it sees."""
        self._start_worker("worker", self["worker"], "keys", self.transcripts()[0])
        if self.profile == "guarded":
            self._start_worker("mask-worker", self["provider"], "worker-keys", self.transcripts()[1])

    def _start_worker(self, name: str, machine: Machine, keys: str, transcript: Path) -> None:
        where, enclave = machine.folder / keys, self["cloud"].folder / "worker-tls" / "cert.pem"
        port = self._port(name, machine)
        tls = ("--tls-cert", where / "cert.pem", "--tls-key", where / "key.pem", "--peer", enclave)
        arguments = (
            "worker",
            "--listen",
            f"tcp:{machine.host}:{port}",
            *tls,
            "--record",
            transcript,
            "--store",
            machine.folder / "store",
            "--json",
        )
        server = self.resources.enter_context(Server(machine, name, *arguments))
        self.servers[name] = server
        self._tap(name, self["cloud"], (machine.host, port))
        server.lines_until("{")

    def start_enclave(self) -> dict[str, Any]:
        """Start it, and connect the parties to it. Where it listens, and its keys, as it says."""
        cloud = self["cloud"]
        self._write_configuration()
        enclave = Server(cloud, "enclave", "serve", "--config", self.configuration, "--json")
        self.servers["enclave"] = self.resources.enter_context(enclave)
        said = enclave.lines_until("}")
        for name in ("channel", "api"):
            for party in ("provider", "alice", "bob", "mallory"):
                if f"{party}-{name}" not in self.taps:
                    self._tap(f"{party}-{name}", self[party], (cloud.host, self._ports[name]))
        told: dict[str, Any] = json.loads(said)
        return told

    def _write_configuration(self) -> None:
        cloud = self["cloud"].folder
        worker = {"worker": self._worker("worker", "keys")}
        if self.profile == "guarded":
            worker["mask_worker"] = self._worker("mask-worker", "worker-keys", "provider")
        tls = cloud / "worker-tls"
        settings = {
            "listen": f"{self['cloud'].host}:{self._port('api', self['cloud'])}",
            "channel": f"{self['cloud'].host}:{self._port('channel', self['cloud'])}",
            "state": str(cloud / "state"),
            **worker,
            "tls": {"certificate": str(tls / "cert.pem"), "private_key": str(tls / "key.pem")},
            "profile": self.profile,
            "attestation": {"producer": "simulated", "key_file": str(cloud / "platform" / "key.pem")},
            "bundles": [str(self.bundles)],
        }
        self.configuration.write_text(yaml.safe_dump(settings))

    def _worker(self, name: str, keys: str, machine: str = "worker") -> dict[str, str]:
        certificate = self["cloud"].folder / f"{name}.pem"
        shutil.copy(self[machine].folder / keys / "cert.pem", certificate)
        return {"address": f"tcp:{self.taps[name].address}", "peer": str(certificate)}

    def policy(self, **claims: Any) -> dict[str, Any]:
        """What a party accepts of this enclave, from what is public. `claims`: in place of what is right."""
        enclave = self.servers["enclave"]
        measured = measure_process(self.configuration.read_bytes(), enclave.words, enclave.machine.environment)
        platform = Identity.load(self["cloud"].folder / "platform").key.public_key().public_bytes_raw().hex()
        workers = {"workers": [self._fingerprint("worker", "keys")]}
        if self.profile == "guarded":
            workers["mask_workers"] = [self._fingerprint("provider", "worker-keys")]
        return {
            "version": 1,
            "require": [["simulated"]],
            "allow_simulated": True,
            "simulated": {"keys": [platform]},
            "claims": {
                "configuration": [measured.configuration],
                "arguments": [list(measured.arguments)],
                "environment": {name: [value] for name, value in measured.environment.items()},
                "least_profile": self.profile,
                **workers,
                **claims,
            },
        }

    def _fingerprint(self, machine: str, keys: str) -> str:
        return Identity.load(self[machine].folder / keys).fingerprint

    def write_policy(self, party: str, name: str = "policy.yaml", **claims: Any) -> Path:
        """Write a party's policy."""
        path = self[party].folder / name
        path.write_text(yaml.safe_dump(self.policy(**claims)))
        return path

    def options(self, party: str, *, enclave: str | None = None, policy: str = "policy.yaml") -> tuple[Any, ...]:
        """Of a party's commands: which enclave, what is accepted, who asks."""
        folder = self[party].folder
        where = enclave or self.taps[f"{party}-channel"].address
        return ("--enclave", where, "--policy", folder / policy, "--identity", folder / "keys")

    def owner(
        self, party: str, command: str, *more: object, enclave: str | None = None, policy: str = "policy.yaml"
    ) -> str:
        """`obfuscatune owner COMMAND`."""
        api = ("--api", self.taps[f"{party}-api"].address)
        return run(self[party], "owner", command, *self.options(party, enclave=enclave, policy=policy), *api, *more)

    def grant(
        self, bundle: str = "base", name: str = MODEL, owners: Sequence[str] = ("alice", "bob")
    ) -> dict[str, Any]:
        """The provider lets the owners use the model, for a while, and asks to be asked before an adapter leaves."""
        terms = ("--until", "2099-01-01", "--export", "provider-consent", "--tokens", 1_000_000)
        named = [part for it in owners for part in ("--owner", self[it].folder / "keys" / "cert.pem")]
        where = ("--bundle", self.bundles / bundle, "--key-file", self.key, "--name", name)
        options = (*self.options("provider"), *where, *named, *terms)
        told: dict[str, Any] = run_json(self["provider"], "provider", "grant", *options)
        return told

    @contextmanager
    def proxy(self) -> Iterator[str]:
        """Alice's proxy, while the `with` lasts: its URL."""
        options = (*self.options("alice"), "--api", self.taps["alice-api"].address, "--port", 0)
        with Server(self["alice"], "proxy", "owner", "proxy", *options) as server:
            told = server.lines_until("OPENAI_BASE_URL=")
            yield told.partition("OPENAI_BASE_URL=")[2].split()[0]

    # Addresses

    def channel_of(self, party: str) -> TcpAddress:
        """Of the enclave, as a party finds it."""
        cloud = self["cloud"]
        return (
            TcpAddress(cloud.host, self._ports["channel"]) if party == "mallory" else self._tapped(f"{party}-channel")
        )

    def api_of(self, party: str) -> TcpAddress:
        """Of the enclave's API, as a party finds it."""
        return self._tapped(f"{party}-api")

    def _tapped(self, name: str) -> TcpAddress:
        return TcpAddress(self.taps[name].host, self.taps[name].port)

    def identity(self, party: str) -> Identity:
        """A party's key, in this process: for what no command does."""
        return Identity.load(self[party].folder / "keys")

    def policy_of(self, party: str) -> Policy:
        """A party's policy, read."""
        return Policy.from_file(self[party].folder / "policy.yaml")

    def _tap(self, name: str, near: Machine, target: tuple[str, int]) -> None:
        record = self.network / f"{name}.bin"
        self.taps[name] = self.resources.enter_context(Tap(near.gateway, target, record))

    def _port(self, name: str, machine: Machine) -> int:
        """A port that is free now, and is this program's from then on: the configuration, which is measured, has it."""
        if name not in self._ports:
            self._ports[name] = _free_port(machine)
        return self._ports[name]


def _free_port(machine: Machine) -> int:
    if machine.prefix:
        return 7000 + secrets.randbelow(2000)  # its network is its own
    with socket.create_server((machine.host, 0)) as found:
        return int(found.getsockname()[1])


def core_limit(pid: int) -> str:
    """The most bytes of a core dump that a process may leave, soft and hard, as the kernel says."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/limits").read_text("utf-8").splitlines():
            if line.startswith("Max core file size"):
                return " ".join(line.split()[4:6])
    raise ConnectionLost(f"process {pid} has gone")
