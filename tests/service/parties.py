"""A whole service in processes of its own, with simulated evidence, and the parties that speak with it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.assets import tiny_model_path
from obfuscatune.attest.policy import Policy
from obfuscatune.channel.client import Attested
from obfuscatune.channel.grants import Consent, Grant, Revocation, Terms, next_sequence
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.measure import measure_process
from obfuscatune.protocol.endpoints import TcpAddress
from obfuscatune.protocol.tls import fingerprint
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.seal import seal

MODEL = "tiny"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name in ("PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
}


@dataclass
class Party:
    """An owner or a provider: an identity, and a secret."""

    identity: Identity
    secret: bytes = field(default_factory=lambda: os.urandom(32))

    @classmethod
    def make(cls, name: str) -> Party:
        return cls(Identity.generate(name))

    @property
    def spki(self) -> str:
        return self.identity.fingerprint

    def files(self, folder: Path) -> tuple[str, str]:
        """Certificate and key as files, for an HTTP client."""
        folder.mkdir(parents=True, exist_ok=True)
        key = self.identity.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / "cert.pem").write_bytes(self.identity.certificate_pem)
        (folder / "key.pem").write_bytes(key)
        (folder / "key.pem").chmod(0o600)
        return str(folder / "cert.pem"), str(folder / "key.pem")


@dataclass
class Cloud:
    """A directory with all that a service needs, and the service's process."""

    folder: Path
    provider: Party
    owners: list[Party]
    worker: str
    limits: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    """What the parties' policy allows besides."""
    process: subprocess.Popen[bytes] | None = None
    where: dict[str, Any] = field(default_factory=dict)
    key: BundleKey | None = None
    clients: list[Any] = field(default_factory=list)
    manifest: str = ""

    def prepare(self) -> None:
        """Seal the model, and write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.simulation = Ed25519PrivateKey.generate()
        path = self.folder / "simulation.pem"
        path.write_bytes(
            self.simulation.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        path.chmod(0o600)
        self.key = BundleKey.generate()
        bundle = self.folder / "bundle"
        self.manifest = seal(tiny_model_path(), str(bundle), key=self.key, signer=self.provider.identity.key)
        config = {
            "listen": "127.0.0.1:0",
            "channel": "127.0.0.1:0",
            "operator": "127.0.0.1:0",
            "state": str(self.folder / "state"),
            "worker": {"address": self.worker},
            "attestation": {"producer": "simulated", "key_file": str(path)},
            "bundles": [str(self.folder)],
            "limits": self.limits,
            **self.settings,
        }
        self.config = self.folder / "service.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.command = [sys.executable, "-m", "obfuscatune", "serve", "--config", str(self.config), "--json"]

    def start(self) -> None:
        """Run the service until it says that it listens."""
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT)
        assert self.process.stdout is not None
        text = b""
        while not text.rstrip().endswith(b"}"):
            line = self.process.stdout.readline()
            assert line, (self.folder / "service.log").read_text()[-3000:]
            text += line
        self.where = json.loads(text)

    def stop(self) -> int:
        """Ask it to end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def policy(self) -> Policy:
        measured = measure_process(self.config.read_bytes(), self.command, ENVIRONMENT)
        return Policy.from_document(
            {
                "version": 1,
                "require": [["simulated"]],
                "allow_simulated": True,
                "simulated": {"keys": [self.simulation.public_key().public_bytes_raw().hex()]},
                "claims": {
                    "configuration": [hashlib.sha256(self.config.read_bytes()).hexdigest()],
                    "arguments": [list(measured.arguments)],
                    "environment": {name: [value] for name, value in measured.environment.items()},
                    **self.claims,
                },
            }
        )

    @contextlib.contextmanager
    def channel(self, party: Party) -> Iterator[Attested]:
        host, _, port = str(self.where["channel"]).rpartition(":")
        with Attested.connect(TcpAddress(host, int(port)), party.identity, self.policy) as attested:
            yield attested

    def terms(self, **changes: Any) -> Terms:
        """What the provider allows all owners."""
        terms: dict[str, Any] = {
            "owners": tuple(owner.spki for owner in self.owners),
            "uses": ("inference", "fine-tuning"),
            "export": "provider-consent",
            "until": datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
            "tokens": None,
        }
        return Terms(**{**terms, **changes})

    def grant(self, **changes: Any) -> dict[str, Any]:
        """The provider grants the model to all owners."""
        grant = Grant(MODEL, self.manifest, str(self.folder / "bundle"), self.terms(**changes), next_sequence())
        assert self.key is not None
        with self.channel(self.provider) as channel, self.key.secret.view as view:
            return channel.release("grant", grant.sign(self.provider.identity), bytes(view))

    def revoke(self) -> dict[str, Any]:
        with self.channel(self.provider) as channel:
            revocation = Revocation(MODEL, self.manifest, next_sequence())
            return channel.request("revoke", revocation.sign(self.provider.identity))

    def consent(self, owner: Party, adapter: str) -> dict[str, Any]:
        with self.channel(self.provider) as channel:
            consent = Consent(MODEL, self.manifest, owner.spki, adapter)
            return channel.request("consent", consent.sign(self.provider.identity))

    def release(self, owner: Party) -> dict[str, Any]:
        with self.channel(owner) as channel:
            return channel.release("owner-key", {}, owner.secret)

    def http(self, party: Party) -> httpx.Client:
        """An HTTP client with the party's certificate."""
        options = {"base_url": self.url, "verify": self.context(party), "timeout": 120, "trust_env": False}
        return httpx.Client(**options)  # type: ignore[arg-type]

    def openai(self, party: Party) -> openai.OpenAI:
        """The official client with the party's certificate."""
        http = openai.DefaultHttpxClient(verify=self.context(party), trust_env=False)
        self.clients.append(http)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=http, max_retries=0)

    @property
    def url(self) -> str:
        return f"https://{self.where['api']}"

    def context(self, party: Party) -> ssl.SSLContext:
        """TLS with the certificate of the service alone, whose key its evidence names."""
        host, _, port = str(self.where["api"]).rpartition(":")
        pem = ssl.get_server_certificate((host, int(port)))
        with self.channel(party) as channel:
            assert fingerprint(pem.encode()) == channel.verified.claims.http_key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=pem)
        context.load_cert_chain(*party.files(self.folder / f"identity-{party.spki[:8]}"))
        return context


def ready(cloud: Cloud, owner: Party) -> None:
    """Wait until the model answers, a bounded time."""
    with cloud.http(owner) as http:
        for _ in range(600):
            models = http.get("/obfuscatune/v1/status").json()["models"]
            if models and models[0]["status"] != "loading":
                assert models[0]["status"] == "ready", models
                return
            time.sleep(0.1)
    raise AssertionError("the model was not loaded in time")
