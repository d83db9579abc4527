"""/v1/fine_tuning/jobs and /v1/models: jobs, their events and checkpoints, and the models that an owner may use."""

import hashlib
import re
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import Field, model_validator

from obfuscatune.service import tables as rows
from obfuscatune.service.access import FINE_TUNING
from obfuscatune.service.api.context import FINE_TUNED, Asker, Context, Ctx, find_target
from obfuscatune.service.api.errors import ApiError, not_found
from obfuscatune.service.api.files import UPLOADED, After, get_file, listed
from obfuscatune.service.api.requests import Metadata, Name, Strict
from obfuscatune.service.keys import Owner
from obfuscatune.service.state import Row, new_id

router = APIRouter(tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]


class Hyperparameters(Strict):
    """OpenAI's; "auto" is the recipe's default."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"


class Supervised(Strict):
    """OpenAI's `method.supervised`."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Strict):
    """OpenAI's `method`; other types than supervised are not offered."""

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class RecipeFields(Strict):
    """Settings of `obfuscatune finetune` that OpenAI has no name for: `extra_body={"recipe": {...}}`."""

    lora_r: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Literal["linear", "cosine", "constant"] | None = None
    warmup_steps: Annotated[int, Field(ge=0, le=10**6)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    accumulation: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=10**6)] | None = None
    max_length: Annotated[int, Field(ge=2, le=2**20)] | None = None
    too_long: Literal["error", "truncate", "drop"] | None = None
    checkpoint_every: Annotated[int, Field(ge=1, le=10**6)] | None = None


class JobBody(Strict):
    """POST /v1/fine_tuning/jobs."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    recipe: RecipeFields | None = None

    @model_validator(mode="after")
    def _one(self) -> "JobBody":
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters is the old name of method.supervised.hyperparameters: leave one out")
        return self

    @property
    def asked(self) -> Hyperparameters:
        """Where they stand in either form."""
        return self.method.supervised.hyperparameters if self.method else self.hyperparameters or Hyperparameters()


@router.post("/v1/fine_tuning/jobs")
def create(
    body: JobBody,
    context: Ctx,
    owner: Asker,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> dict[str, Any]:
    """Queue a job. The same `Idempotency-Key` gives the same job."""
    target = find_target(context, owner, body.model)
    if target.adapter is not None:
        raise ApiError(400, "A fine-tuned model is not fine-tuned further.", param="model", code="model_not_available")
    context.access.check(target.grant.model, owner.spki, FINE_TUNING)
    details = job_details(context, owner, body)
    key = None
    if idempotency_key is not None:
        key = hashlib.sha256(f"{owner.spki}/{idempotency_key}".encode()).hexdigest()
    job_id, most = new_id("ftjob-"), context.settings.limits.jobs_queued
    row = context.state.add_job(owner, job_id, details, target.grant.model, idempotency=key, most=most)
    if row is None:
        raise ApiError(
            429, f"At most {most} jobs of an owner wait or run.", kind="rate_limit_error", code="too_many_jobs"
        )
    if row.id == job_id:
        context.jobs.tell(owner, job_id, f"Created fine-tuning job: {job_id}")
        context.log.append(
            owner.spki,
            "job-created",
            {"job": job_id, "model": target.grant.model, "grant": target.grant.id, "data": details["data"]["training"]},
        )
        context.jobs.wake()
    return job_object(row)


def job_details(context: Context, owner: Owner, body: JobBody) -> dict[str, Any]:
    """What is kept of a job that was asked for.

    Raises:
        ApiError: a file is not there, or is for something else.
    """
    training = _data_file(context, owner, body.training_file, "training_file")
    validation = None
    if body.validation_file is not None:
        validation = _data_file(context, owner, body.validation_file, "validation_file")
    hyperparameters = {
        name: default if value == "auto" else value
        for (name, value), default in zip(body.asked.model_dump().items(), (3, 8, 1.0), strict=True)
    }
    return {
        "training_file": training.id,
        "validation_file": None if validation is None else validation.id,
        "data": {
            "training": training.details["sha256"],
            "validation": None if validation is None else validation.details["sha256"],
        },
        "hyperparameters": hyperparameters,
        "recipe": {} if body.recipe is None else body.recipe.model_dump(exclude_none=True),
        "suffix": body.suffix,
        "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
        "metadata": body.metadata,
        "fine_tuned_model": None,
        "trained_tokens": None,
        "finished_at": None,
        "estimated_finish": None,
        "error": None,
        "result_files": [],
        "products": {"requests": 0, "verified": 0},
    }


def _data_file(context: Context, owner: Owner, file_id: str, param: str) -> Row:
    row = get_file(context, owner, file_id, param)
    if row.clear["purpose"] != UPLOADED:
        raise ApiError(400, f"{param} is not a file for fine-tuning.", param=param, code="invalid_file")
    return row


@router.get("/v1/fine_tuning/jobs")
def list_jobs(context: Ctx, owner: Asker, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """The owner's jobs, the newest first."""
    page = context.state.page(rows.jobs, owner, after=after, limit=limit)
    return listed([job_object(row) for row in page.rows], page.has_more)


def get_job(context: Context, owner: Owner, job_id: str) -> Row:
    """A job's row.

    Raises:
        ApiError: the owner has none of that id.
    """
    row = context.state.get(rows.jobs, owner, job_id)
    if row is None:
        raise not_found("fine-tuning job", job_id, code="fine_tune_not_found", param="fine_tuning_job_id")
    return row


@router.get("/v1/fine_tuning/jobs/{job_id}")
def retrieve(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """One job."""
    return job_object(get_job(context, owner, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """End a job for good."""
    return _ask(context, owner, job_id, rows.CANCELLED)


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """Stop a job at its next step, with a checkpoint."""
    return _ask(context, owner, job_id, rows.PAUSED)


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """Queue a paused job; it goes on from its checkpoint."""
    return _ask(context, owner, job_id, rows.QUEUED)


def _ask(context: Context, owner: Owner, job_id: str, wanted: str) -> dict[str, Any]:
    row = get_job(context, owner, job_id)
    if not context.jobs.ask(owner, row, wanted):
        now = get_job(context, owner, job_id).clear["status"]
        raise ApiError(400, f"Job has status {now}, from which it cannot become {wanted}.", code="invalid_job_status")
    context.log.append(owner.spki, f"job-{wanted}", {"job": job_id})
    return job_object(get_job(context, owner, job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
def list_events(job_id: str, context: Ctx, owner: Asker, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """What happened in a job, the newest first."""
    get_job(context, owner, job_id)
    page = context.state.page(rows.events, owner, after=after, limit=limit, job=job_id)
    return listed([_event_object(row) for row in page.rows], page.has_more)


def _event_object(row: Row) -> dict[str, Any]:
    head = {"object": "fine_tuning.job.event", "id": row.id, "created_at": row.created_at}
    return {**head, **{name: row.details[name] for name in ("level", "message", "type", "data")}}


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def list_checkpoints(job_id: str, context: Ctx, owner: Asker, after: After = None, limit: Limit = 10) -> dict[str, Any]:
    """The checkpoints of a job that are kept, the newest first; each answers under its name."""
    get_job(context, owner, job_id)
    page = context.state.page(rows.checkpoints, owner, after=after, limit=limit, job=job_id)
    return listed([_checkpoint_object(row) for row in page.rows], page.has_more)


def _checkpoint_object(row: Row) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": row.id,
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.details["model"],
        "fine_tuning_job_id": row.clear["job"],
        "metrics": row.details["metrics"],
        "step_number": row.details["step"],
    }


@router.get("/v1/models")
def list_models(context: Ctx, owner: Asker) -> dict[str, Any]:
    """Models that were granted to the owner, and those that he fine-tuned."""
    granted = {it.model for it in context.access.granted_to(owner.spki) if context.models.get(it.model) is not None}
    data = [_model_object(name, context) for name in sorted(granted)]
    after = None
    while True:
        page = context.state.page(rows.adapters, owner, after=after, limit=100)
        data += [_adapter_object(row) for row in page.rows if row.clear["model"] in granted]
        if not page.has_more:
            return {"object": "list", "data": data}
        after = page.rows[-1].id


@router.get("/v1/models/{model}")
def retrieve_model(model: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """One model."""
    target = find_target(context, owner, model)
    if target.adapter is None:
        return _model_object(model, context)
    row = context.state.get(rows.adapters, owner, model.split(":")[4])
    return _model_object(model, context) if row is None else {**_adapter_object(row), "id": model}


@router.delete("/v1/models/{model}")
def remove_model(model: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """Delete a fine-tuned model, with its checkpoints."""
    target = find_target(context, owner, model)
    if target.adapter is None or model.count(":") != 4:
        raise ApiError(403, "Only fine-tuned models can be deleted.", kind="permission_error", code="not_deletable")
    row_id = model.split(":")[4]
    context.jobs.remove_adapter(owner, row_id, f"ftjob-{row_id}")
    context.models.withdraw_adapter(model)
    target.engine.unload(model)
    context.log.append(owner.spki, "model-deleted", {"adapter": row_id})
    return {"id": model, "object": "model", "deleted": True}


def _model_object(name: str, context: Context) -> dict[str, Any]:
    model = context.models.get(name.split(":")[1] if name.startswith(FINE_TUNED) else name)
    created = int(time.time()) if model is None else model.granted_at
    return {"id": name, "object": "model", "created": created, "owned_by": "provider"}


def _adapter_object(row: Row) -> dict[str, Any]:
    return {"id": row.details["model"], "object": "model", "created": row.created_at, "owned_by": "owner"}


def fine_tuned_name(model: str, owner: str, suffix: str | None, job_id: str) -> str:
    """The name of what a job makes, in OpenAI's form `ft:MODEL:ORGANIZATION:SUFFIX:ID`."""
    return f"{FINE_TUNED}{model}:{owner[:8]}:{suffix or ''}:{re.sub('^ftjob-', '', job_id)}"


def job_object(row: Row) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`."""
    it = row.details
    return {
        "object": "fine_tuning.job",
        "id": row.id,
        "created_at": row.created_at,
        "finished_at": it["finished_at"],
        "model": row.clear["model"],
        "fine_tuned_model": it["fine_tuned_model"],
        "organization_id": f"owner-{row.owner[:8]}",
        "status": row.clear["status"],
        "hyperparameters": it["hyperparameters"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": it["hyperparameters"]}},
        "training_file": it["training_file"],
        "validation_file": it["validation_file"],
        "result_files": it["result_files"],
        "trained_tokens": it["trained_tokens"],
        "error": it["error"],
        "seed": it["seed"],
        "estimated_finish": it["estimated_finish"],
        "integrations": [],
        "metadata": it["metadata"],
        "user_provided_suffix": it["suffix"],
    }
