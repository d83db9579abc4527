"""/obfuscatune/v1: what OpenAI has no name for. Receipts, adapters, the audit log, evidence, the owner's standing."""

import io
import tarfile
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from obfuscatune.channel.audit_chain import MOST_ENTRIES
from obfuscatune.errors import TermsError
from obfuscatune.service import tables as rows
from obfuscatune.service.api.context import Asker, Context, Ctx
from obfuscatune.service.api.errors import ApiError, not_found
from obfuscatune.service.api.estimate import estimate_job
from obfuscatune.service.api.fine_tuning import JobBody, get_job
from obfuscatune.service.keys import Owner
from obfuscatune.service.models import ServedModel

router = APIRouter(prefix="/obfuscatune/v1", tags=["obfuscatune"])


@router.get("/status")
def status(context: Ctx, owner: Asker) -> dict[str, Any]:
    """What is granted to the owner, what was used of it, and what he keeps here."""
    models, registry = [], context.access.registry
    for grant in context.access.granted_to(owner.spki):
        served = context.models.get(grant.model)
        models.append(
            {
                "model": grant.model,
                "grant": grant.id,
                "manifest": grant.manifest,
                "status": "missing" if served is None else served.status,
                "terms": grant.terms.to_document() | {"owners": [owner.spki]},
                "tokens_used": context.state.tokens_used(grant.id),
                "consented": registry.consents_to(grant.model, owner.spki),
                "waiting": [it["adapter"] for it in registry.asked(grant.model) if it["owner"] == owner.spki],
                "chat_template": _has_chat_template(served),
            }
        )
    count, stored = context.state.stored(owner.spki)
    return {"object": "status", "owner": owner.spki, "models": models, "files": count, "stored_bytes": stored}


@router.get("/evidence")
def evidence(context: Ctx, owner: Asker) -> dict[str, Any]:
    """The service's claims, with evidence that belongs to no session: what receipts hold. See the attested channel."""
    return {"object": "evidence", **context.attested.to_document()}


@router.get("/jobs/{job_id}/progress")
def progress(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """How far a job is: steps, time a step, products, masks. `running` is null where it does not run now."""
    job = get_job(context, owner, job_id)
    return {
        "object": "progress",
        "job": job.id,
        "status": job.clear["status"],
        "running": context.jobs.progress(job.id),
    }


@router.post("/estimate")
def estimate(body: JobBody, context: Ctx, owner: Asker) -> dict[str, Any]:
    """What a job would cost, counted by the model's tokenizer: the body is that of a job, and nothing is begun."""
    return {"object": "estimate", **estimate_job(context, owner, body)}


@router.get("/jobs/{job_id}/receipt")
def receipt(job_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """The signed receipt of a job that succeeded: `obfuscatune verify-receipt` reads it."""
    job = get_job(context, owner, job_id)
    row = context.state.get(rows.receipts, owner, _receipt_id(job.id))
    if row is None:
        raise not_found("receipt", job_id, code="receipt_not_found")
    return dict(row.details)


@router.get("/jobs/{job_id}/adapter", response_class=Response)
def adapter(job_id: str, context: Ctx, owner: Asker) -> Response:
    """The adapter that a job made, as a tar of PEFT's files, where the provider's terms let it go."""
    job = get_job(context, owner, job_id)
    row = context.state.get(rows.adapters, owner, job.id[6:])
    if row is None:
        raise not_found("adapter", job_id, code="adapter_not_found")
    try:
        context.access.check_export(row.clear["model"], owner.spki, row.details["model"])
    except TermsError as error:
        context.ask_consent(row.clear["model"], owner.spki, row.details["model"])
        context.log.append(owner.spki, "export-refused", {"job": job.id})
        raise ApiError(403, str(error), kind="permission_error", code="export_not_allowed") from error
    served = context.models.get(row.clear["model"])
    if served is None:
        raise ApiError(503, "The model is not here.", kind="server_error", code="model_unavailable")
    directory = context.models.run_directory(served, owner.spki, job.id)
    files = {name: directory.read(f"adapter/{name}") for name in sorted(row.details["sha256"])}
    context.log.append(owner.spki, "adapter-exported", {"job": job.id, "sha256": row.details["sha256"]})
    headers = {"content-disposition": f'attachment; filename="{job.id}.tar"'}
    return Response(_tar(files), media_type="application/x-tar", headers=headers)


Since = Annotated[int, Query(ge=0, le=MOST_ENTRIES, description="How many entries from the beginning to leave out.")]


@router.get("/audit-log", response_class=Response)
def audit_log(context: Ctx, owner: Asker, since: Since = 0) -> Response:
    """The log: the owner's entries and the service's in clear, others' as digests. For `obfuscatune verify-log`."""
    return StreamingResponse(_lines(context, owner, since), media_type="application/jsonl")


def _lines(context: Context, owner: Owner, since: int) -> Iterator[bytes]:
    yield from context.log.copy_for(owner.spki, since)


def _has_chat_template(served: ServedModel | None) -> bool | None:
    """None where it is not known yet."""
    tokenizer = None if served is None else served.tokenizer
    return None if tokenizer is None else tokenizer.chat_template is not None


def _receipt_id(job_id: str) -> str:
    return f"receipt-{job_id[6:]}"


def _tar(files: dict[str, bytes]) -> bytes:
    """The files, with nothing of this machine in their entries."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
