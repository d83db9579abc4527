"""The owner's data: checked on this machine, and only then uploaded to the verified enclave."""

from typing import Annotated
from urllib.parse import unquote

from anyio import to_thread
from fastapi import Path, Request
from fastapi.responses import Response

from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.pages import text
from obfuscatune.console.records import check_records
from obfuscatune.console.shell import Shell
from obfuscatune.console.views import StoredFile
from obfuscatune.errors import DataError, IntegrityError

_UPLOADED = "fine-tune"
FileId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


def add(shell: Shell, connection: OwnerConnection) -> None:
    """Add the pages of data."""
    router = shell.router

    @router.get("/data")
    def data(request: Request) -> Response:
        """What lies at the enclave, and the place to drop a file."""
        return shell.page(request, "owner/data.html", files=stored_files(connection))

    @router.post("/data/check")
    async def check(request: Request) -> Response:
        """Read a file's lines, here; it leaves this machine for nobody. Its content is the body."""
        content, name = await request.body(), _name(request)
        checked = await to_thread.run_sync(check_records, content)
        return shell.page(request, "parts/checked.html", checked=checked, name=name, size=len(content))

    @router.post("/data/upload")
    async def upload(request: Request) -> Response:
        """Check a file again, and send it to the enclave."""
        content, name = await request.body(), _name(request)
        sent = await to_thread.run_sync(_send, connection, content, name)
        return shell.redirect(f"/jobs/new?file={sent.id}")

    @router.post("/data/{file_id}/delete")
    def delete(file_id: FileId) -> Response:
        """Delete a file at the enclave, for good."""
        connection.service.document("DELETE", f"/v1/files/{file_id}")
        return shell.redirect("/data")


def stored_files(connection: OwnerConnection) -> list[StoredFile]:
    """The owner's files at the service, the newest first."""
    told = connection.service.document("GET", "/v1/files", params={"purpose": _UPLOADED, "limit": 1000})
    found = told.get("data")
    if not isinstance(found, list):
        raise IntegrityError(text("error.answer_list"))
    return [StoredFile.read(it) for it in found]


def _send(connection: OwnerConnection, content: bytes, name: str) -> StoredFile:
    if not check_records(content).is_usable:
        raise DataError(text("error.lines", name=name))
    files = {"file": (name, content, "application/jsonl")}
    return StoredFile.read(connection.service.document("POST", "/v1/files", data={"purpose": _UPLOADED}, files=files))


def _name(request: Request) -> str:
    """The file's own name, which its owner gave it: printable, and the last part alone."""
    given = unquote(request.headers.get("x-file-name", ""), errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(it for it in given if it.isprintable())[:255] or "upload.jsonl"
