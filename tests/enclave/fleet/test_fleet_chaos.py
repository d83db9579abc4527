"""A run of fine-tuning on a fleet whose workers are killed and stopped at random: as if nothing had happened.

Four workers over TLS, known by their operator's authority. `make test-long` runs it; by itself:
`pytest -m long tests/enclave/fleet/test_fleet_chaos.py -s`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

import obfuscatune
from obfuscatune import Fleet, TlsConfig
from obfuscatune.bench.wire import free_port
from obfuscatune.enclave.fleet import FleetClient
from obfuscatune.enclave.fleet.request import FleetProduct
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.machine import cores
from obfuscatune.protocol.authority import issue, make_authority, make_request
from obfuscatune.protocol.certificates import make_identity
from obfuscatune.protocol.files import write_new

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

WORKERS, BLOWS, DOWN_AT_MOST = 4, 20, 2
LONGEST_SECONDS = 3.0
BUSY = 2.5
"""Processes a core, beyond which times say nothing: the run itself makes for one or two."""


@pytest.fixture
def tls_fleet(tmp_path: Path) -> Iterator[tuple[Path, TlsConfig, list[LocalWorker]]]:
    """A fleet's file, our identity, and the workers, over TLS on loopback."""
    ours, our_key = make_identity("enclave")
    (tmp_path / "enclave.pem").write_bytes(ours)
    write_new(tmp_path / "enclave.key", our_key)
    authority, authority_key = make_authority("cloud-a")
    (tmp_path / "cloud-a.pem").write_bytes(authority)
    members = []
    with ExitStack() as stack:
        workers = []
        for index in range(WORKERS):
            request, key = make_request(f"w{index}")
            (tmp_path / f"w{index}.pem").write_bytes(issue(request, f"w{index}", authority, authority_key))
            write_new(tmp_path / f"w{index}.key", key)
            tls = ("--tls-cert", f"{tmp_path}/w{index}.pem", "--tls-key", f"{tmp_path}/w{index}.key")
            arguments = [*tls, "--peer", f"{tmp_path}/enclave.pem", "--threads", "1"]
            worker = stack.enter_context(LocalWorker(arguments, listen=f"tcp:127.0.0.1:{free_port()}"))
            workers.append(worker)
            members.append({"address": worker.address, "certificate": f"w{index}.pem", "operator": "cloud-a",
                            "party": "compute"})  # fmt: skip
        document = {
            "members": members,
            "operators": {"cloud-a": {"party": "compute", "authority": "cloud-a.pem"}},
            "placement": {"replicas": 2},
        }
        (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(document))
        identity = TlsConfig(tmp_path / "enclave.pem", tmp_path / "enclave.key", b"")
        yield tmp_path / "fleet.yaml", identity, workers


class Tormentor:
    """Kills a worker, or stops it, again and again; those that are down for longest are brought back."""

    def __init__(self, workers: list[LocalWorker]) -> None:
        self.blows: list[str] = []
        self.is_over, self._is_stopped = threading.Event(), threading.Event()
        self._workers, self._random = workers, random.Random(20)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Bring all back, and end."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        down: list[tuple[LocalWorker, int]] = []
        while len(self.blows) < BLOWS and not self._is_stopped.is_set():
            self._is_stopped.wait(self._random.uniform(0.3, 1.2))
            while len(down) >= DOWN_AT_MOST:
                self._bring_back(*down.pop(0))
            victim = self._random.choice([it for it in self._workers if it not in [other for other, _ in down]])
            signum = self._random.choice([signal.SIGKILL, signal.SIGSTOP])
            os.kill(victim.pid, signum)
            self.blows.append(f"{signal.Signals(signum).name} {victim.address}")
            down.append((victim, signum))
        for it in down:
            self._bring_back(*it)
        self.is_over.set()

    def _bring_back(self, worker: LocalWorker, signum: int) -> None:
        if signum == signal.SIGSTOP:
            os.kill(worker.pid, signal.SIGCONT)
        else:
            worker.restart()


def model_with_lora() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=128, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def losses_of(model: GPT2LMHeadModel, steps: int | None, tormentor: Tormentor | None) -> list[float]:
    """Of `steps` LoRA steps, or of as many as the torment lasts."""
    torch.manual_seed(1)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True))
    optimizer = torch.optim.AdamW([it for it in lora.parameters() if it.requires_grad], lr=1e-3)
    batches = torch.randint(0, 96, (16, 2, 24), generator=torch.Generator().manual_seed(2))
    losses: list[float] = []
    while len(losses) != steps and not (tormentor is not None and tormentor.is_over.is_set()):
        batch = batches[len(losses) % len(batches)]
        loss = lora(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_blows_in_a_run_leave_no_trace(
    tls_fleet: tuple[Path, TlsConfig, list[LocalWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, identity, workers = tls_fleet
    waits: list[float] = []
    result = FleetProduct.result

    def timed(self: FleetProduct) -> torch.Tensor:
        started = time.monotonic()
        try:
            return result(self)
        finally:
            waits.append(time.monotonic() - started)

    monkeypatch.setattr(FleetProduct, "result", timed)
    with obfuscatune.protect(model_with_lora(), Fleet.read(path), tls=identity, base="closed", first_blocks=0) as model:
        tormentor = Tormentor(workers)
        try:
            losses = losses_of(model, None, tormentor)
        finally:
            tormentor.stop()
        client = model.protection.client
        assert isinstance(client, FleetClient)
        stats = client.stats
        print(f"\n{len(losses)} steps, {len(tormentor.blows)} blows, longest wait {max(waits):.2f} s\n{stats}")
        assert stats.lost >= BLOWS // 4
        assert stats.left_wrong == 0
    plain = losses_of(model_with_lora(), len(losses), None)
    assert len(losses) > BLOWS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    assert stats.crossings == len(waits), "each product counted once"
    load = os.getloadavg()[0] / cores()
    if max(waits) >= LONGEST_SECONDS and load > BUSY:
        pytest.skip(f"longest wait {max(waits):.2f} s, and not judged: this machine has {load:.1f} processes a core")
    assert max(waits) < LONGEST_SECONDS
