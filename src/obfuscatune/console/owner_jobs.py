"""The owner's jobs: what one will cost, how it goes, what came of it."""

import asyncio
import io
import json
import secrets
import tarfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import Form, HTTPException, Path, Query, Request
from fastapi.responses import Response, StreamingResponse

from obfuscatune.client import jobs as api
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.owner_data import stored_files
from obfuscatune.console.pages import format_count, format_small, format_span, text
from obfuscatune.console.shell import Shell, attachment
from obfuscatune.console.views import Event, Job, Model, Progress
from obfuscatune.documents import canonical
from obfuscatune.errors import ConnectionLost, ObfuscaTuneError, TermsError

_SECONDS_BETWEEN_LOOKS = 1.0
_LEAST_STALL_SECONDS = 8.0
JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
Name = Annotated[str, Form(min_length=1, max_length=256)]
Epochs = Annotated[int, Form(ge=1, le=50)]
BatchSize = Annotated[int, Form(ge=1, le=256)]
Rate = Annotated[float, Form(gt=0, le=100)]
Validation = Annotated[str, Form(max_length=128)]
Suffix = Annotated[str, Form(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")]


def add(shell: Shell, connection: OwnerConnection) -> None:
    """Add the pages of jobs."""
    router = shell.router

    @router.get("/jobs")
    def jobs(request: Request) -> Response:
        """All jobs."""
        found = [Job.read(it) for it in api.list_jobs(connection.service)]
        return shell.page(request, "owner/jobs.html", jobs=found)

    @router.get("/jobs/new")
    def new(request: Request, file: Annotated[str, Query(max_length=128)] = "") -> Response:
        """The form of a job."""
        models = [it for it in granted_models(connection) if "fine-tuning" in it.uses]
        return shell.page(request, "owner/new_job.html", models=models, files=stored_files(connection), file=file)

    @router.post("/jobs/estimate")
    def estimate(
        request: Request,
        model: Name,
        file: Name,
        epochs: Epochs = 3,
        batch_size: BatchSize = 8,
        rate: Rate = 1.0,
        suffix: Suffix = "",
        validation: Validation = "",
    ) -> Response:
        """What a job will cost, counted in the enclave by the model's own tokenizer."""
        if any(it.name == model and it.status == "loading" for it in granted_models(connection)):
            return shell.page(request, "parts/loading.html")
        body = _body(model, file, epochs, batch_size, rate, suffix, validation)
        told = connection.service.document("POST", "/obfuscatune/v1/estimate", json=body)
        return shell.page(request, "parts/estimate.html", estimate=told)

    @router.post("/jobs")
    def create(
        model: Name,
        file: Name,
        epochs: Epochs = 3,
        batch_size: BatchSize = 8,
        rate: Rate = 1.0,
        suffix: Suffix = "",
        validation: Validation = "",
        key: Annotated[str, Form(max_length=64)] = "",
    ) -> Response:
        """Begin a job; the same key is the same job, however often a button is pressed."""
        headers = {"idempotency-key": key or secrets.token_hex(16)}
        body = _body(model, file, epochs, batch_size, rate, suffix, validation)
        job = Job.read(connection.service.document("POST", "/v1/fine_tuning/jobs", json=body, headers=headers))
        return shell.redirect(f"/jobs/{job.id}")

    @router.get("/jobs/{job_id}")
    def job(request: Request, job_id: JobId) -> Response:
        """One job, as it goes on."""
        found = _job(connection, job_id)
        model = next((it for it in granted_models(connection) if it.name == found.model), None)
        receipt = _receipt(connection, found)
        files = {it.id: it.name for it in stored_files(connection)}
        exists = found.tuned is not None and found.tuned in _tuned_names(connection)
        return shell.page(
            request, "owner/job.html", job=found, model=model, receipt=receipt, files=files, exists=exists
        )

    @router.get("/jobs/{job_id}/live")
    async def live(job_id: JobId) -> Response:
        """The job's losses, its progress and its end, as server-sent events."""
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(_follow(connection, job_id), media_type="text/event-stream", headers=headers)

    @router.post("/jobs/{job_id}/cancel")
    def cancel(job_id: JobId) -> Response:
        """End a job for good."""
        connection.service.document("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")
        return shell.redirect(f"/jobs/{job_id}")

    @router.get("/jobs/{job_id}/receipt.json")
    def receipt(job_id: JobId) -> Response:
        """The signed receipt, for `obfuscatune verify-receipt`."""
        content = canonical(api.receipt(connection.service, job_id))
        return attachment(content, f"{job_id}.receipt.json", "application/json")

    @router.get("/jobs/{job_id}/adapter.tar")
    def adapter(job_id: JobId) -> Response:
        """The adapter, where the terms let it go. Looked through before it is handed on."""
        files = api.fetch_adapter(connection.service, job_id)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in sorted(files.items()):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
        return attachment(packed.getvalue(), f"{job_id}.tar", "application/x-tar")

    @router.post("/jobs/{job_id}/delete")
    def delete(job_id: JobId) -> Response:
        """Delete the tuned model of a job, for good."""
        name = _job(connection, job_id).tuned
        if name is None:
            raise HTTPException(404)
        connection.service.document("DELETE", f"/v1/models/{quote(name, safe='')}")
        return shell.redirect(f"/jobs/{job_id}")

    @router.post("/jobs/{job_id}/ask")
    def ask(request: Request, job_id: JobId) -> Response:
        """Ask the provider to let the adapter go: the enclave notes what was refused for want of his consent."""
        try:
            api.fetch_adapter(connection.service, job_id)
        except TermsError:
            return shell.page(request, "parts/asked.html")
        return shell.redirect(f"/jobs/{job_id}")


def granted_models(connection: OwnerConnection) -> list[Model]:
    """The models that were granted to the owner."""
    told = connection.service.document("GET", "/obfuscatune/v1/status").get("models")
    return [Model.read(it) for it in told] if isinstance(told, list) else []


def _tuned_names(connection: OwnerConnection) -> set[str]:
    """Of the owner's tuned models that are there."""
    return {str(it.get("id", "")) for it in api.pages(connection.service, "/v1/models")}


def _body(
    model: str, file: str, epochs: int, batch_size: int, rate: float, suffix: str, validation: str
) -> dict[str, Any]:
    asked = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": rate}
    method = {"type": "supervised", "supervised": {"hyperparameters": asked}}
    body: dict[str, Any] = {"model": model, "training_file": file, "method": method}
    chosen = {"suffix": suffix, "validation_file": validation}
    return body | {name: value for name, value in chosen.items() if value}


def _job(connection: OwnerConnection, job_id: str) -> Job:
    return Job.read(connection.service.document("GET", f"/v1/fine_tuning/jobs/{job_id}"))


def _receipt(connection: OwnerConnection, job: Job) -> dict[str, Any] | None:
    """What the receipt of a job says, where there is one."""
    if job.status != "succeeded":
        return None
    document = api.receipt(connection.service, job.id).get("document")
    if not isinstance(document, dict):
        return None
    products, masks = document.get("products"), document.get("masks")
    return {
        "products": products if isinstance(products, dict) else {},
        "masks": masks if isinstance(masks, dict) else None,
        "steps": document.get("steps"),
        "tokens": document.get("tokens"),
        "profile": str(document.get("profile")),
        "data": str((document.get("data") or {}).get("training")),
        "adapter": document.get("adapter") if isinstance(document.get("adapter"), dict) else {},
    }


async def _follow(connection: OwnerConnection, job_id: str) -> AsyncIterator[bytes]:
    seen: set[str] = set()
    step, since = -1, time.monotonic()
    while True:
        try:
            found, progress, events = await to_thread.run_sync(_look, connection, job_id, seen)
        except ObfuscaTuneError as error:
            if isinstance(error, ConnectionLost):
                connection.supervisor.soon()
            yield _event("problem", {"message": str(error), "standing": connection.seconds_left is not None})
            return
        seen.update(it.id for it in events)
        if progress.step != step or found.status != "running":
            step, since = progress.step, time.monotonic()
        yield _event("state", {**_state(found, progress, events), "stalled": _stalled(progress, since)})
        if found.is_over:
            yield _event("over", {"status": found.status})
            return
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


def _look(connection: OwnerConnection, job_id: str, seen: set[str]) -> tuple[Job, Progress, list[Event]]:
    """The job, then what happened in it that is not yet in `seen`, the oldest first."""
    service = connection.service
    found = _job(connection, job_id)
    progress = Progress.read(service.document("GET", f"/obfuscatune/v1/jobs/{job_id}/progress"))
    events: list[Event] = []
    for document in api.pages(service, f"/v1/fine_tuning/jobs/{job_id}/events"):
        event = Event.read(document)
        if event.id in seen:
            break
        events.append(event)
    return found, progress, events[::-1]


def _state(job: Job, progress: Progress, events: list[Event]) -> dict[str, Any]:
    speed = progress.tokens_per_second
    return {
        "status": job.status,
        "step": progress.step,
        "steps": progress.steps,
        "speed": None if speed is None else f"{speed:,.0f}",
        "left": None if progress.seconds_left is None else format_span(progress.seconds_left),
        "verified": _share(progress),
        "requests": None if progress.verified is None else _products(progress),
        "advantage": None if progress.advantage is None else format_small(progress.advantage),
        "budget": None if progress.budget is None else text("job.allowed", budget=f"{progress.budget:g}"),
        "events": [asdict(it) for it in events],
    }


def _stalled(progress: Progress, since: float) -> str | None:
    """What to say of a job that has made no step for long, measured by its own pace."""
    waited, pace = time.monotonic() - since, progress.seconds_per_step
    if pace is None or waited < max(_LEAST_STALL_SECONDS, 5 * pace):
        return None
    return text("job.stalled", span=format_span(waited))


def _share(progress: Progress) -> str | None:
    """Of the products so far that were verified; rounded down, so that 100 % is all of them."""
    if progress.verified is None or not progress.requests:
        return None
    return f"{100 * progress.verified // progress.requests} %"


def _products(progress: Progress) -> str:
    return text("job.products", verified=format_count(progress.verified), requests=format_count(progress.requests))


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
