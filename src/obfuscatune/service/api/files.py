"""/v1/files: training data in, results out. A file's content is sealed under its owner's key, whole or absent."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from obfuscatune.errors import DataError
from obfuscatune.service import tables as rows
from obfuscatune.service.api.context import Asker, Context, Ctx
from obfuscatune.service.api.errors import ApiError, not_found
from obfuscatune.service.api.multipart import Upload, read_upload
from obfuscatune.service.keys import Owner
from obfuscatune.service.state import Row, new_id
from obfuscatune.training.data_files import read_jsonl
from obfuscatune.training.layouts import UPLOADED_LAYOUTS, detect_format

router = APIRouter(tags=["files"])
UPLOADED, RESULTS = "fine-tune", "fine-tune-results"
SEALED_AS = "file"
After = Annotated[str | None, Query(max_length=128)]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": [UPLOADED]},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_FORM)
async def upload(request: Request, context: Ctx, owner: Asker) -> dict[str, Any]:
    """Upload training data: JSON Lines of chats, or of prompts with completions."""
    content_type = request.headers.get("content-type", "")
    with context.rates.upload(owner.spki):
        form = await read_upload(content_type, request.stream(), most_bytes=context.settings.limits.file_bytes)
        try:
            return await to_thread.run_sync(_keep, context, owner, form)
        finally:
            form.close()


def _keep(context: Context, owner: Owner, form: Upload) -> dict[str, Any]:
    purpose = form.fields.pop("purpose", None)
    if purpose != UPLOADED:
        raise ApiError(
            400, f"Files are taken for the purpose {UPLOADED} alone.", param="purpose", code="invalid_purpose"
        )
    if form.fields:
        name = next(iter(form.fields))[:64]
        raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
    if form.descriptor < 0:
        raise ApiError(400, "Missing required parameter: file", param="file", code="missing_required_parameter")
    filename = _clean(form.filename or "upload.jsonl")
    try:
        lines, layout = check_training_data(Path(form.path))
    except DataError as error:
        told = str(error).replace(form.path, filename)
        raise ApiError(400, told, param="file", code="invalid_file_format") from None
    limits = context.settings.limits
    with context.storing:
        count, stored = context.state.stored(owner.spki)
        if count >= limits.files or stored + form.size > limits.stored_bytes:
            raise ApiError(
                400,
                f"An owner keeps at most {limits.files} files and {limits.stored_bytes} bytes here: delete some.",
                code="storage_limit_exceeded",
            )
        row = store(context, owner, new_id("file-"), form.content(), UPLOADED, filename, lines, layout)
    return file_object(row)


def check_training_data(path: Path) -> tuple[int, str]:
    """Number and layout of a file's records, each of which is read.

    Raises:
        DataError: a line that is no record, or of another layout than the two of OpenAI.
    """
    found, lines = None, 0
    for line in read_jsonl(path):
        if found is None:
            found = detect_format(line)
            if found.layout.name not in UPLOADED_LAYOUTS:
                raise DataError(f"{line.where}: expected `messages`, or `prompt` and `completion`")
        found.read(line)
        lines += 1
    return lines, found.layout.name if found is not None else ""


def store(
    context: Context,
    owner: Owner,
    row_id: str,
    content: bytes,
    purpose: str,
    filename: str,
    lines: int | None = None,
    layout: str | None = None,
) -> Row:
    """Keep a file's content, sealed, and then the row that tells of it."""
    details = {
        "filename": filename,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "lines": lines,
        "layout": layout,
    }
    sealed = owner.seal(content, SEALED_AS, row_id)
    context.storage.write_file(str(context.files / row_id), sealed)
    row = context.state.add(rows.files, owner, row_id, details, stored_bytes=len(sealed), purpose=purpose)
    context.log.append(owner.spki, "file-created", {"file": row_id, "sha256": details["sha256"], "purpose": purpose})
    return row


def content_of(context: Context, owner: Owner, row: Row) -> bytes:
    """A file's content.

    Raises:
        IntegrityError: it is not what was stored.
        StorageError: it cannot be read.
    """
    return owner.open(context.storage.read(str(context.files / row.id)), SEALED_AS, row.id)


def get_file(context: Context, owner: Owner, file_id: str, param: str | None = None) -> Row:
    """A file's row.

    Raises:
        ApiError: the owner has none of that id.
    """
    row = context.state.get(rows.files, owner, file_id)
    if row is None:
        raise not_found("File object", file_id, code="file_not_found", param=param)
    return row


@router.get("/v1/files")
def list_files(
    context: Ctx,
    owner: Asker,
    purpose: Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_-]+$")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> dict[str, Any]:
    """The owner's files."""
    where = {} if purpose is None else {"purpose": purpose}
    page = context.state.page(rows.files, owner, after=after, limit=limit, ascending=order == "asc", **where)
    return listed([file_object(row) for row in page.rows], page.has_more)


@router.get("/v1/files/{file_id}")
def retrieve(file_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """One file."""
    return file_object(get_file(context, owner, file_id))


@router.get("/v1/files/{file_id}/content", response_class=Response)
def content(file_id: str, context: Ctx, owner: Asker) -> Response:
    """A file's content."""
    row = get_file(context, owner, file_id)
    context.log.append(owner.spki, "file-read", {"file": row.id})
    return Response(content_of(context, owner, row), media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
def remove(file_id: str, context: Ctx, owner: Asker) -> dict[str, Any]:
    """Delete a file; one that a job still needs stays."""
    row = get_file(context, owner, file_id)
    for status in (rows.QUEUED, rows.RUNNING, rows.PAUSED):
        for job in context.state.page(rows.jobs, owner, limit=100, status=status).rows:
            if row.id in (job.details["training_file"], job.details["validation_file"]):
                raise ApiError(409, f"The job {job.id} needs this file.", code="file_in_use")
    context.state.remove(rows.files, owner, row.id)
    context.storage.remove_file(str(context.files / row.id))
    context.log.append(owner.spki, "file-deleted", {"file": row.id})
    return {"id": row.id, "object": "file", "deleted": True}


def file_object(row: Row) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.details["bytes"],
        "created_at": row.created_at,
        "expires_at": None,
        "filename": row.details["filename"],
        "purpose": row.clear["purpose"],
        "status": "processed",
        "status_details": None,
    }


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def _clean(filename: str) -> str:
    """The last part of a name, printable."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(character for character in name if character.isprintable())[:255] or "upload.jsonl"
