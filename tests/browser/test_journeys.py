"""Each role's way from the first page to the result, and what a user sees when something is refused."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.browser.conftest import Eyes, console
from tests.parties.world import MODEL, World, run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
ATTACK = "<img src=x onerror=document.title='owned'>"
RECORDS = [{"prompt": f"Question: who is number {n}?\nAnswer:", "completion": f" Ann{n}"} for n in range(24)]


def upload(records: list[dict[str, Any]], name: str = "notes.jsonl") -> dict[str, Any]:
    content = "".join(json.dumps(it) + "\n" for it in records).encode()
    return {"name": name, "mimeType": "application/jsonl", "buffer": content}


def begin_job(
    page: Any, base: str, *, records: list[dict[str, Any]] = RECORDS, epochs: int = 3, suffix: str = ""
) -> None:
    """From the page of data to a job that runs."""
    page.goto(f"{base}/data")
    page.set_input_files("#file", upload(records))
    page.click("#upload")
    page.wait_for_url("**/jobs/new?file=*")
    page.fill("#epochs", str(epochs))
    page.fill("#suffix", suffix)
    page.wait_for_selector("#estimate .figure")
    page.click("#begin")
    page.wait_for_url("**/jobs/ftjob-*")


def test_the_owner_from_the_first_page_to_the_adapter(
    world: World, eyes: Eyes, opened: Callable[[str], Any], tmp_path: Path
) -> None:
    with console(world, "owner", "alice") as link:
        page, base = opened(link), link.split("/enter#")[0]
        page.wait_for_selector("text=the evidence is simulated")
        page.wait_for_selector(f"text={MODEL}")
        eyes.look(page, "owner-enclave")
        page.goto(f"{base}/jobs")
        eyes.look(page, "owner-jobs-empty")
        page.goto(f"{base}/compare")
        page.wait_for_selector("text=There is no tuned model yet.")

        page.goto(f"{base}/data")
        eyes.look(page, "owner-data")
        wrong = [RECORDS[0], {"prompt": ATTACK}, {ATTACK: ATTACK}]
        page.set_input_files("#file", upload(wrong, f"{ATTACK}.jsonl"))
        page.wait_for_selector("text=2 lines cannot be used")
        assert page.locator(".faults tbody th").all_inner_texts() == ["2", "3"]
        assert not page.locator("#upload").count()
        eyes.look(page, "owner-data-wrong")
        page.set_input_files("#file", upload(RECORDS))
        page.wait_for_selector("text=All 24 records can be used")
        eyes.look(page, "owner-data-good")
        page.click("#upload")
        page.wait_for_url("**/jobs/new?file=*")
        page.wait_for_selector("#estimate .figure")
        before = page.inner_text("#estimate .figure")
        page.fill("#epochs", "6")
        page.dispatch_event("#epochs", "change")
        page.wait_for_function("old => document.querySelector('#estimate .figure')?.innerText !== old", arg=before)
        cost = page.inner_text("#estimate .value")
        page.fill("#suffix", "notes")
        eyes.look(page, "owner-new-job")
        page.click("#begin")
        page.wait_for_url("**/jobs/ftjob-*")
        job = page.url.rpartition("/")[2]
        page.wait_for_selector(".u-wrap")
        page.wait_for_selector("[data-masks]:not([hidden])")  # guarded: masks have an account
        eyes.look(page, "owner-job-running")
        page.wait_for_selector("text=Signed by the enclave")
        page.wait_for_selector(".u-wrap")
        assert cost in page.inner_text("section:has(h2:has-text('Receipt'))")  # it cost what was said
        page.click("text=As a table")
        assert page.locator("#losses tr").count() == 18
        eyes.look(page, "owner-job-done")
        with page.expect_download() as told:
            page.click("section >> a:has-text('Receipt')")
        told.value.save_as(tmp_path / "receipt.json")
        run("verify-receipt", tmp_path / "receipt.json", "--policy", world.root / "policy.yaml")

        page.click("text=Compare with the base")
        assert page.input_value("#mode") == "text"  # this model has no chat template
        page.fill("#prompt", f"{ATTACK} {RECORDS[3]['prompt']}")
        page.fill("#tokens", "16")
        page.click("#ask")
        for side in ("base", "tuned"):
            page.wait_for_selector(f"#answers-{side} output:not([aria-busy])")
            assert page.inner_text(f"#answers-{side} output").strip()
            assert not page.locator(f"#answers-{side} .bad").count()
        eyes.look(page, "owner-compare")

        page.goto(f"{base}/jobs/{job}")
        page.click("text=Ask the provider")
        page.wait_for_selector("text=Asked.")
    world.stop("service")
    world.start_service()  # what waits for the provider, waits over a restart
    world.grant("--export", "provider-consent", "--tokens", "200000")
    with (
        console(world, "owner", "alice") as link,
        console(world, "provider", "provider", "--keys", str(world.root / "provider")) as providers,
    ):
        page, base = opened(link), link.split("/enter#")[0]
        page.goto(f"{base}/jobs/{job}")
        page.wait_for_selector("text=has not answered yet")
        eyes.look(page, "owner-asked")
        provider = opened(providers)
        provider.wait_for_selector("text=Owners wait for your consent")
        eyes.look(provider, "provider-asked")
        provider.on("dialog", lambda dialog: dialog.accept())
        provider.click("button:has-text('Consent')")
        provider.wait_for_selector("text=Owners wait for your consent", state="detached")
        page.reload()
        with page.expect_download() as told:
            page.click("text=Download the adapter")
        told.value.save_as(tmp_path / "adapter.tar")
        with tarfile.open(tmp_path / "adapter.tar") as archive:
            assert set(archive.getnames()) == {"adapter_config.json", "adapter_model.safetensors"}
        page.goto(f"{base}/jobs")
        eyes.look(page, "owner-jobs")
        page.goto(f"{base}/log")
        page.wait_for_selector("tr:has-text('Adapter handed out') .badge:has-text('Left the enclave')")
        eyes.look(page, "owner-log")
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{base}/jobs/{job}")
        page.click("text=Delete the tuned model")
        page.wait_for_selector("text=The tuned model was deleted")
        assert not page.locator("text=Compare with the base").count()
        page.goto(f"{base}/data")
        eyes.look(page, "owner-data-stored")
        page.click("button:has-text('Delete')")
        page.wait_for_selector("text=Nothing of yours lies at the enclave yet.")
        page.goto(f"{base}/jobs/ftjob-none")
        eyes.look(page, "owner-missing")
        assert "owned" not in page.title()
        page.goto(f"{base}/")
        page.click("text=Sign out")
        page.wait_for_url("**/enter")
        eyes.look(page, "enter")


def test_a_job_is_cancelled(world: World, opened: Callable[[str], Any]) -> None:
    with console(world, "owner", "bob") as link:
        page = opened(link)
        begin_job(page, link.split("/enter#")[0], epochs=50)
        page.wait_for_selector(".u-wrap")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("text=Cancel job")
        page.wait_for_selector(".badge.job-cancelled")


def test_the_operator_sees_what_is_busy(world: World, eyes: Eyes, opened: Callable[[str], Any]) -> None:
    page = opened(world.console)
    page.wait_for_selector("text=Compute worker")
    page.wait_for_selector("text=Mask worker")
    eyes.look(page, "operator")
    shown = page.content()
    for private in (MODEL, "notes.jsonl", world.owners["alice"].fingerprint[:12], "ftjob-"):
        assert private not in shown


def test_a_worker_is_lost_and_comes_back(world: World, eyes: Eyes, opened: Callable[[str], Any]) -> None:
    with console(world, "owner", "alice") as link:
        page = opened(link)
        begin_job(page, link.split("/enter#")[0], epochs=12)
        page.wait_for_selector(".u-wrap")
        for name in ("worker", "mask_worker"):
            world.kill(name)
        page.wait_for_selector("text=the enclave waits for its workers", timeout=60_000)
        assert page.inner_text("[data-field=left]") == "–"
        eyes.look(page, "owner-worker-lost", hurries=True)  # workers are waited for a minute
        world.start_worker()
        page.wait_for_selector("text=Signed by the enclave", timeout=180_000)


def test_a_grant_is_given_and_revoked(world: World, eyes: Eyes, opened: Callable[[str], Any]) -> None:
    keys = world.root / "provider"
    with (
        console(world, "provider", "provider", "--keys", str(keys)) as link,
        console(world, "owner", "alice") as owners,
    ):
        page, base = opened(link), link.split("/enter#")[0]
        page.on("dialog", lambda dialog: dialog.accept())
        eyes.look(page, "provider-grants")
        page.goto(f"{base}/releases")
        eyes.look(page, "provider-releases-empty")
        page.goto(f"{base}/models")
        page.fill("#name", "second")
        page.fill("#bundle", str(world.bundle))
        page.fill("#owners", (world.root / "alice" / "cert.pem").read_text())
        page.fill("#until", "2099-01-01")
        page.fill("#tokens", "5000")
        eyes.look(page, "provider-models")
        page.click("#release")
        page.wait_for_url(f"{base}/")
        page.wait_for_selector(".model h3:has-text('second')")
        page.goto(f"{base}/releases")
        page.wait_for_selector("td:has-text('second')")
        eyes.look(page, "provider-releases")
        owner = opened(owners)
        owner.wait_for_selector(".model h3:has-text('second')")
        page.goto(f"{base}/")
        page.click(".model:has(h3:has-text('second')) button:has-text('Revoke')")
        page.wait_for_selector(".model h3:has-text('second')", state="detached")
        owner.reload()
        owner.wait_for_selector(f".model h3:has-text('{MODEL}')")
        assert not owner.locator(".model h3:has-text('second')").count()

        owner_base = owners.split("/enter#")[0]
        begin_job(owner, owner_base, epochs=50)
        owner.wait_for_selector(".u-wrap")
        page.click(f".model:has(h3:has-text('{MODEL}')) button:has-text('Revoke')")
        page.wait_for_selector("text=Nothing is granted here")
        eyes.look(page, "provider-revoked")
        owner.wait_for_selector(".badge.job-queued, .badge.job-failed")
        owner.goto(f"{owner_base}/compare")
        owner.goto(f"{owner_base}/")
        owner.wait_for_selector("text=No provider has granted you a model")
        eyes.look(owner, "owner-revoked")
        world.grant("--export", "provider-consent")


def test_an_enclave_that_changes_is_refused_while_the_console_runs(
    world: World, eyes: Eyes, opened: Callable[[str], Any]
) -> None:
    """Its configuration becomes another: nothing goes there any more, and every page says why."""
    policy = yaml.safe_load((world.root / "policy.yaml").read_text())
    (world.root / "policy.yaml").write_text(yaml.safe_dump({**policy, "freshness_seconds": 8}))
    with console(world, "owner", "bob") as link:
        page, base = opened(link), link.split("/enter#")[0]
        page.wait_for_selector("#standing.simulated")
        world.stop("service")
        page.goto(f"{base}/data")
        page.wait_for_selector("#standing.refused", timeout=30_000)  # it cannot be reached, and its evidence is too old
        eyes.look(page, "owner-expired")
        page.goto(f"{base}/")
        page.wait_for_selector("text=It held, and counts no more")
        assert not page.locator(".badge.holds").count()
        eyes.look(page, "owner-past")
        world._settings["limits"] = {"max_tokens": 64}
        world.start_service()
        page.goto(f"{base}/")
        page.wait_for_function("document.body.innerText.includes('claims.configuration')", timeout=30_000)
        page.reload()
        page.wait_for_selector("text=No. Nothing was sent.")
        eyes.look(page, "owner-refused")
        page.goto(f"{base}/jobs")
        page.wait_for_selector("text=Nothing is sent")
        eyes.look(page, "owner-refused-page")
