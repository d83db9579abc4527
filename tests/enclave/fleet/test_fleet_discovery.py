"""Members that a list names come and go; what the policy refuses is never connected to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
import yaml

from obfuscatune import Fleet, TlsConfig
from obfuscatune.enclave.fleet import open_fleet
from obfuscatune.fleet.listing import format_list
from obfuscatune.fleet.members import Member
from obfuscatune.protocol.addresses import parse_address
from obfuscatune.protocol.authority import issue, make_authority, make_request
from obfuscatune.protocol.certificates import make_identity
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.tls import PinnedTls
from tests.enclave.fleet.members import stored
from tests.worker.serving import serving

SECONDS = 20.0


@dataclass
class Cloud:
    """An operator with an authority, in a folder."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.authority, self._key = make_authority(self.name)
        (self.folder / f"{self.name}.pem").write_bytes(self.authority)

    @contextmanager
    def worker(self, name: str) -> Iterator[Member]:
        """A worker over TLS, as a list names it."""
        request, key = make_request(name)
        certificate = issue(request, name, self.authority, self._key)
        (self.folder / f"{name}.pem").write_bytes(certificate)
        write_new(self.folder / f"{name}.key", key)
        tls = TlsConfig(self.folder / f"{name}.pem", self.folder / f"{name}.key", self.folder / "enclave.pem")
        listen = parse_address("tcp:127.0.0.1:0")
        with serving(self.folder, listen=listen, tls=PinnedTls(tls, server=True)) as it:
            yield Member(str(it.address), certificate, self.name, "compute")


@contextmanager
def listed(members: list[Member]) -> Iterator[str]:
    """The URL of a list that names what `members` holds at the time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = format_list(members, [None] * len(members))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/fleet.json"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_listed_members_join_and_leave_and_strangers_stay_out(tmp_path: Path) -> None:
    certificate, key = make_identity("enclave")
    (tmp_path / "enclave.pem").write_bytes(certificate)
    write_new(tmp_path / "enclave.key", key)
    cloud, stranger = Cloud(tmp_path, "cloud-a"), Cloud(tmp_path, "cloud-b")
    notices: list[str] = []
    with cloud.worker("one") as one, cloud.worker("two") as two, stranger.worker("three") as three:
        present = [one, three]
        with listed(present) as url:
            document = {"discover": url, "operators": {"cloud-a": {"party": "compute", "authority": "cloud-a.pem"}}}
            (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(document))
            fleet = Fleet.read(tmp_path / "fleet.yaml").only("compute")
            identity = TlsConfig(tmp_path / "enclave.pem", tmp_path / "enclave.key", b"")
            with open_fleet(fleet, tls=identity, notice=notices.append) as client:
                W, x = torch.randn(20, 64), torch.randn(3, 20)
                matrices = [stored(client, W, bytes([number]) * 16) for number in (1, 2)]
                assert [it.name for it in client.links] == [one.address]
                assert any(three.address in line and "left out" in line for line in notices)
                for now, then in (([two, one], {one.address, two.address}), ([two], {two.address})):
                    client.update(now, frozenset())
                    deadline = time.monotonic() + SECONDS
                    while {name for it in client.placement() for name in it.holders} != then or any(
                        not shard.holders for shard in client.placement()
                    ):
                        assert time.monotonic() < deadline
                        time.sleep(0.01)
                    for matrix_id in matrices:
                        assert torch.allclose(client.multiply(matrix_id, x, transpose=False), x @ W, atol=1e-4)
                assert [it.name for it in client.links] == [two.address]
