"""Protected models on a fleet: plain results, whoever answers wrongly, and parties that are never mixed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

import obfuscatune
from obfuscatune import Fleet, Masking, TlsConfig
from obfuscatune.enclave.fleet import FleetClient
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, WrongProduct
from obfuscatune.fleet.members import Member
from obfuscatune.protocol.authority import make_authority
from obfuscatune.protocol.certificates import make_identity
from tests.enclave.fleet.members import members

IDS = torch.arange(48).view(2, 24) % 96


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def fleet_of(model: torch.nn.Module) -> FleetClient:
    client = model.protection.client  # type: ignore[union-attr]
    assert isinstance(client, FleetClient)
    return client


@pytest.mark.parametrize("profile", ["private", "guarded"])
def test_a_wrong_product_names_its_member_and_the_run_goes_on(profile: str) -> None:
    with members(3) as them, members(2) as maskers:
        masks = {"mask_worker": list(maskers)} if profile == "guarded" else {"verify": 1.0}
        with obfuscatune.protect(tiny(), list(them), profile, base="closed", **masks) as model:
            plain = logits(tiny())
            torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)
            client = fleet_of(model)
            liar = client.placement()[0].holders[0]
            them[liar].lie = 1e-2
            torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)
            assert client.stats.left_wrong == 1
            if profile == "guarded":
                mask_client = model.protection.masks.client
                liar = mask_client.placement()[0].holders[0]
                maskers[liar].lie = 1e-2
                model.protection.masks.stats.dropped = 0
                for _ in range(3):  # masks that were drawn before are right
                    torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)
                assert mask_client.stats.left_wrong == 1


def test_each_member_that_is_found_wrong_met_other_secret_vectors() -> None:
    """Members of one hand would else learn from each other's refusals what a check does not see."""
    with members(4) as them, obfuscatune.protect(tiny(), list(them), base="closed", verify=1.0) as model:
        plain, client = logits(tiny()), fleet_of(model)
        first = model.protection.offloaded[0].crossing.product
        seen: list[torch.Tensor] = []
        for number in range(3):
            seen.append(first.held.verifier.probe(transpose=False).R)
            shard = next(it for it in client.placement() if it.matrix == first.held.matrix_id.hex())
            them[shard.holders[0]].lie = 1e-2
            torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)
            assert client.stats.left_wrong == number + 1
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_gradients_are_those_of_the_plain_model() -> None:
    with members(3) as them, obfuscatune.protect(tiny(), list(them), base="closed") as model:
        assert any(len(shard.holders) == 1 for shard in fleet_of(model).placement())
        plain = tiny()
        for it in (plain, model):
            embeddings = it.get_input_embeddings()
            embeddings.weight.requires_grad_(True)
            it(IDS, labels=IDS).loss.backward()
        wanted, came = (it.get_input_embeddings().weight.grad for it in (plain, model))
        torch.testing.assert_close(came, wanted, rtol=0, atol=2e-5)


def test_a_fleet_of_liars_ends_the_run_for_good() -> None:
    with members(2) as them, obfuscatune.protect(tiny(), list(them), base="closed", verify=1.0) as model:
        for it in them.values():
            it.lie = 1.0
        with pytest.raises(WrongProduct, match="load or protect the model anew"):
            for _ in range(20):
                logits(model)
        with pytest.raises(WrongProduct, match="load or protect the model anew"):
            logits(model)


def test_a_member_that_stops_delays_a_step_by_less_than_three_seconds(
    worker: LocalWorker, mask_worker: LocalWorker
) -> None:
    """What it alone held is sent to the other; later it comes back. `test_fleet_chaos` kills members too."""
    with obfuscatune.protect(tiny(), [worker.address, mask_worker.address], base="closed") as model:
        plain, client = logits(tiny()), fleet_of(model)
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            came = logits(model)
            assert time.monotonic() - started < 3
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        torch.testing.assert_close(came, plain, rtol=0, atol=2e-5)
        assert client.stats.lost == 1
        deadline = time.monotonic() + 30
        while client.stats.workers < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.stats.returned == 1
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)


def test_a_forked_child_uses_the_fleet_on_its_own() -> None:
    with members(2) as them, obfuscatune.protect(tiny(), list(them), base="closed") as model:
        plain = logits(model)
        child = os.fork()
        if child == 0:
            same = torch.allclose(logits(model), plain, rtol=0, atol=2e-5)
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5)


def test_one_address_is_a_worker_and_no_fleet() -> None:
    with members(1) as them, obfuscatune.protect(tiny(), list(them), base="closed") as model:
        assert not isinstance(model.protection.client, FleetClient)


def test_devices_are_members_too() -> None:
    with obfuscatune.protect(tiny(), ["device:cpu:1", "device:cpu:2"], base="closed") as model:
        torch.testing.assert_close(logits(model), logits(tiny()), rtol=0, atol=2e-5)
        assert fleet_of(model).stats.workers == 2


def test_parties_are_never_mixed(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/{name}" for name in "abc"]
    for compute, mask in (
        (addresses[:2], addresses[1:]),
        (addresses[:2], addresses[0]),
        (addresses[0], addresses[:2]),
    ):
        with pytest.raises(ConfigError, match=r"one address|both parties"):
            obfuscatune.protect(tiny(), compute, "guarded", mask_worker=mask)
    with pytest.raises(ConfigError, match="no member of the mask party"):
        obfuscatune.protect(tiny(), Fleet.of_addresses(addresses), "guarded")
    certificate, _ = make_identity("both")
    (tmp_path / "both.pem").write_bytes(certificate)
    fleet = Fleet((Member("tcp:10.0.0.7:7600", certificate, "a", "compute"),))
    masking = Masking(TlsConfig(tmp_path / "ours.pem", tmp_path / "ours.key", tmp_path / "both.pem"))
    with pytest.raises(ConfigError, match="pinned by the same key"):
        obfuscatune.protect(tiny(), fleet, "guarded", mask_worker="tcp:10.0.0.8:7600", masking=masking)
    with pytest.raises(ConfigError, match="must be one"):
        obfuscatune.protect(tiny(), addresses, "paper")


def test_one_authority_does_not_sign_for_both_parties(tmp_path: Path) -> None:
    """Two files, so that neither's policy sees the other's."""
    authority, _ = make_authority("cloud-a")
    (tmp_path / "cloud-a.pem").write_bytes(authority)
    fleets = []
    for party in ("compute", "mask"):
        operators = {"cloud-a": {"party": party, "authority": "cloud-a.pem"}}
        (tmp_path / "fleet.yaml").write_text(
            yaml.safe_dump({"discover": "http://127.0.0.1:1/fleet.json", "operators": operators})
        )
        fleets.append(Fleet.read(tmp_path / "fleet.yaml"))
    with pytest.raises(ConfigError, match="pinned by the same key"):
        obfuscatune.protect(tiny(), fleets[0], "guarded", mask_worker=fleets[1])
