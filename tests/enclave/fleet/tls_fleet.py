"""Worker processes over TLS, known by their operators' authorities, as a fleet's file names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from obfuscatune import TlsConfig
from obfuscatune.enclave.local_worker import WORKER_MODULE, LocalWorker
from obfuscatune.fleet.members import Party
from obfuscatune.protocol.authority import issue, make_authority, make_request
from obfuscatune.protocol.certificates import make_identity
from obfuscatune.protocol.files import write_new
from tests.enclave.fleet.namespaces import Place


@dataclass
class TlsFleet:
    """An enclave's identity, and operators with workers, in a folder."""

    folder: Path
    document: dict[str, Any] = field(default_factory=lambda: {"members": [], "operators": {}})
    """What the file says."""

    def __post_init__(self) -> None:
        certificate, key = make_identity("enclave")
        self.certificate, self.key = self.folder / "enclave.pem", self.folder / "enclave.key"
        self.certificate.write_bytes(certificate)
        write_new(self.key, key)
        self._stack = ExitStack()

    @property
    def tls(self) -> TlsConfig:
        return TlsConfig(self.certificate, self.key, b"")

    @property
    def options(self) -> list[str]:
        """Of a command that is to use the fleet."""
        path = self.folder / "fleet.yaml"
        path.write_text(yaml.safe_dump(self.document))
        return ["--fleet", str(path), "--tls-cert", str(self.certificate), "--tls-key", str(self.key)]

    def start(
        self,
        operator: str,
        party: Party,
        places: Sequence[Place],
        programs: Sequence[tuple[str, ...]] = (),
    ) -> list[LocalWorker]:
        """Start a worker of an operator at each place.

        Args:
            programs: what runs there, in the order of the places; a worker at those beyond.
        """
        authority, authority_key = make_authority(operator)
        certificate = self.folder / f"{operator}.pem"
        certificate.write_bytes(authority)
        self.document["operators"][operator] = {"party": party, "authority": str(certificate)}
        workers = []
        for number, place in enumerate(places):
            name = self.folder / f"{operator}-{number}"
            request, key = make_request(name.name)
            name.with_suffix(".pem").write_bytes(issue(request, name.name, authority, authority_key))
            write_new(name.with_suffix(".key"), key)
            tls = ["--tls-cert", f"{name}.pem", "--tls-key", f"{name}.key", "--peer", str(self.certificate)]
            program = programs[number] if number < len(programs) else (WORKER_MODULE,)
            listen = f"tcp:{place.host}:{place.port}"
            worker = LocalWorker([*tls, "--threads", "1"], program=program, listen=listen, within=place.within)
            self._stack.callback(worker.close)
            workers.append(worker)
            member = {"address": listen, "certificate": f"{name}.pem", "operator": operator, "party": party}
            self.document["members"].append(member)
        return workers


@contextmanager
def tls_fleet(folder: Path) -> Iterator[TlsFleet]:
    """A fleet without workers; those that are started end with the `with`."""
    made = TlsFleet(folder)
    with made._stack:
        yield made
