"""Attempts that must fail, and the words in which they must."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.channel.client import Attested
from obfuscatune.channel.grants import Grant, Terms, next_sequence
from obfuscatune.client.connection import connect
from obfuscatune.demo.parties.adversary import RelayingAdversary
from obfuscatune.demo.parties.programs import run
from obfuscatune.demo.parties.stage import MODEL
from obfuscatune.errors import IntegrityError, TermsError
from obfuscatune.sealing.key_file import KeyFile

if TYPE_CHECKING:
    from obfuscatune.demo.parties.story import Story

_OTHER = "00" * 32


def before_the_grant(story: Story) -> None:
    """A policy that foresaw another enclave, a relay, an owner whom nobody granted anything, a changed bundle."""
    stage = story.stage
    stage.write_policy("alice", "other.yaml", configuration=[_OTHER])
    story.refused(
        "alice",
        "verifies by a policy that foresees another configuration",
        lambda: stage.owner("alice", "jobs", policy="other.yaml"),
        "configuration",
    )
    stage.write_policy("alice", "masked.yaml", least_profile="guarded")
    story.refused(
        "alice",
        "verifies by a policy that asks for guarded",
        lambda: stage.owner("alice", "jobs", policy="masked.yaml"),
        "profile",
    )
    enclave = stage.channel_of("mallory")
    with RelayingAdversary(stage["alice"].gateway, (enclave.host, enclave.port)) as adversary:
        story.refused(
            "mallory",
            "relays the enclave's genuine evidence to alice, with a key of her own",
            lambda: stage.owner("alice", "jobs", enclave=adversary.address),
            "report_data",
        )
    story.check("the adversary did relay genuine evidence", adversary.relayed)
    story.refused("alice", "releases her key before any grant", lambda: stage.owner("alice", "jobs"), "no grant")
    _change_one_bit(stage.bundles / "changed")
    story.refused("cloud", "changes one bit of a sealed chunk", lambda: _grant_changed(story), "chunk|changed|sealed")


def of_mask_workers(story: Story) -> None:
    """Another mask worker than the provider's."""
    stage = story.stage
    stage.write_policy("alice", "other.yaml", mask_workers=[_OTHER])
    story.refused(
        "alice",
        "verifies by a policy that names another mask worker",
        lambda: stage.owner("alice", "jobs", policy="other.yaml"),
        "mask_workers",
    )


def after_the_grant(story: Story) -> None:
    """An owner who is not named, and a grant of before."""
    stage = story.stage
    story.refused(
        "mallory", "asks as an owner whom the grant does not name", lambda: stage.owner("mallory", "jobs"), "no grant"
    )
    older = _sign_older(story)
    story.refused(
        "provider",
        "brings back a grant that a newer one replaced",
        lambda: _release(story, older),
        "sequence|older|newer",
    )


def of_other_owners(story: Story, job: str) -> None:
    """What is Alice's does not exist for Bob."""
    for what, path in (
        ("job", f"/v1/fine_tuning/jobs/{job}"),
        ("training file", f"/v1/files/{_training_file(story, job)}/content"),
        ("model", f"/v1/models/{story.tuned}"),
        ("receipt", f"/obfuscatune/v1/jobs/{job}/receipt"),
    ):
        story.refused("bob", f"asks for alice's {what}", lambda path=path: _asked_by_bob(story, path), "^404 ")  # type: ignore[misc]  # a default binds it


def of_changed_documents(story: Story, receipt: Path, log: Path, key: str) -> None:
    """A receipt and a log that were improved afterwards."""
    alice = story.stage["alice"]
    changed = copy.deepcopy(json.loads(receipt.read_text("utf-8")))
    changed["document"]["products"]["verified"] += 1
    better = alice.folder / "receipt-changed.json"
    better.write_text(json.dumps(changed))
    policy = ("--policy", alice.folder / "policy.yaml")
    story.refused(
        "mallory", "changes a number in the receipt", lambda: run(alice, "verify-receipt", better, *policy), "signature"
    )
    lines = log.read_bytes().splitlines(keepends=True)
    shorter = alice.folder / "audit-changed.jsonl"
    shorter.write_bytes(b"".join(lines[:1] + lines[2:]))
    verify = ("verify-log", shorter, "--key", key)
    story.refused("mallory", "takes an entry out of the audit log", lambda: run(alice, *verify), "line 2|chain")


def _change_one_bit(bundle: Path) -> None:
    """Of the largest object: a chunk of the weights."""
    chunk = max((path for path in bundle.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.chmod(0o600)
    chunk.write_bytes(content)


def _grant_changed(story: Story) -> None:
    """Grant the changed bundle. It opens, since its manifest is right; the chunk is refused when it is read."""
    story.stage.grant("changed", "changed")
    raise IntegrityError(story.wait_for_model("changed", "failed"))


def _sign_older(story: Story) -> dict[str, Any]:
    """A grant such as the provider gave before, which names more than the one that stands."""
    stage = story.stage
    kept = KeyFile.read(stage.key)
    kept.key.close()
    owners = tuple(stage.identity(name).fingerprint for name in ("alice", "bob", "mallory"))
    until = datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC)
    terms = Terms(owners, ("inference", "fine-tuning"), "allowed", until)
    earlier = next_sequence() - 3_600_000  # an hour ago
    return Grant(MODEL, kept.manifest_digest, str(stage.bundles / "base"), terms, earlier).sign(
        stage.identity("provider")
    )


def _release(story: Story, signed: dict[str, Any]) -> None:
    stage = story.stage
    kept = KeyFile.read(stage.key)
    try:
        identity, policy = stage.identity("provider"), stage.policy_of("provider")
        with Attested.connect(stage.channel_of("provider"), identity, policy) as channel, kept.key.secret.view as key:
            channel.release("grant", signed, bytes(key))
    finally:
        kept.key.close()


def _training_file(story: Story, job: str) -> str:
    listed = json.loads(story.stage.owner("alice", "jobs", "--json"))
    return str(next(it["training_file"] for it in listed if it["id"] == job))


def _asked_by_bob(story: Story, path: str) -> None:
    stage = story.stage
    policy = stage.policy_of("bob")
    with connect(stage.channel_of("bob"), stage.identity("bob"), policy, api=stage.api_of("bob")) as service:
        reply = service.http.get(path)
    if reply.is_error:
        raise TermsError(f"{reply.status_code} {reply.json()['error']['message']}")
