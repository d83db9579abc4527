"""What an owner's buttons ask of the service: no more than they say, and nothing that its paths were not made for."""

from __future__ import annotations

import json
from urllib.parse import unquote

import pytest

from tests.console.conftest import JOB, TUNED, Served, job_document


def test_a_file_is_deleted_and_no_other(owner_served: Served) -> None:
    headers = owner_served.csrf(owner_served.browser)
    reply = owner_served.browser.post("/data/file-1/delete", headers=headers)
    assert reply.status_code == 204 and reply.headers["hx-redirect"].endswith("/data")
    assert owner_served.api is not None
    assert [it[:2] for it in owner_served.api.came if it[0] != "GET"] == [("DELETE", "/v1/files/file-1")]
    for wrong in ("..%2fjobs", "a" * 129, "a.b"):
        assert not owner_served.browser.post(f"/data/{wrong}/delete", headers=headers).is_success
    assert len([it for it in owner_served.api.came if it[0] == "DELETE"]) == 1


def test_a_tuned_model_is_deleted_by_its_own_name(owner_served: Served) -> None:
    api = owner_served.api
    assert api is not None
    kept = api.answers[f"/v1/fine_tuning/jobs/{JOB}"]
    api.answers[f"/v1/fine_tuning/jobs/{JOB}"] = {**job_document("llama", "succeeded"), "fine_tuned_model": TUNED}
    try:
        reply = owner_served.browser.post(f"/jobs/{JOB}/delete", headers=owner_served.csrf(owner_served.browser))
        assert reply.status_code == 204
        ((_, path, _),) = [it for it in api.came if it[0] == "DELETE"]
        assert unquote(path) == f"/v1/models/{TUNED}"
        api.answers[f"/v1/fine_tuning/jobs/{JOB}"]["fine_tuned_model"] = None
        reply = owner_served.browser.post(f"/jobs/{JOB}/delete", headers=owner_served.csrf(owner_served.browser))
        assert reply.status_code == 404
    finally:
        api.answers[f"/v1/fine_tuning/jobs/{JOB}"] = kept


@pytest.mark.parametrize("validation", ["", "file-2"])
def test_a_job_is_asked_for_as_the_form_says(owner_served: Served, validation: str) -> None:
    api = owner_served.api
    assert api is not None
    kept = api.answers["/v1/fine_tuning/jobs"]
    api.answers["/v1/fine_tuning/jobs"] = job_document("llama", "queued")
    form = {"model": "llama", "file": "file-1", "validation": validation, "suffix": "notes", "epochs": "2"}
    try:
        headers = owner_served.csrf(owner_served.browser)
        assert owner_served.browser.post("/jobs", headers=headers, data=form).status_code == 204
    finally:
        api.answers["/v1/fine_tuning/jobs"] = kept
    ((_, path, body),) = [it for it in api.came if it[0] == "POST"]
    asked = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.0}
    expected = {"model": "llama", "training_file": "file-1", "suffix": "notes"}
    expected |= {"validation_file": validation} if validation else {}
    method = {"type": "supervised", "supervised": {"hyperparameters": asked}}
    assert (path, json.loads(body)) == ("/v1/fine_tuning/jobs", {**expected, "method": method})
