"""Fine-tuning at a verified service: data up, events back, the adapter out by consent.

OpenAI's client does the first two as well; the last is ours.
"""

import io
import re
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from obfuscatune.client.connection import Service
from obfuscatune.errors import DataError, IntegrityError, StorageError

FINISHED = frozenset({"succeeded", "failed", "cancelled"})
_PAGE = 100
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SECONDS_BETWEEN_LOOKS = 1.0


def submit(
    service: Service,
    data: Path,
    model: str,
    *,
    hyperparameters: Mapping[str, Any],
    suffix: str | None = None,
    seed: int | None = None,
    validation: Path | None = None,
) -> dict[str, Any]:
    """Upload a data set and begin to fine-tune on it; the job, in OpenAI's form.

    Raises:
        DataError: a file cannot be read.
        TermsError: the service refuses it; the message names the line of the file, or the term.
    """
    files = {"training_file": _upload(service, data)}
    if validation is not None:
        files["validation_file"] = _upload(service, validation)
    settings = {"model": model, **files, "suffix": suffix, "seed": seed}
    method = {"type": "supervised", "supervised": {"hyperparameters": dict(hyperparameters)}}
    body = {name: value for name, value in settings.items() if value is not None} | {"method": method}
    again = {"idempotency-key": secrets.token_hex(16)}  # so that it is one job, however often the request arrives
    return service.document("POST", "/v1/fine_tuning/jobs", json=body, headers=again)


def _upload(service: Service, path: Path) -> str:
    try:
        with path.open("rb") as file:
            sent = {"file": (path.name, file, "application/jsonl")}
            return str(service.document("POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent)["id"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def list_jobs(service: Service) -> list[dict[str, Any]]:
    """All jobs of this owner, the newest first."""
    return list(pages(service, "/v1/fine_tuning/jobs"))


def events(service: Service, job: str, *, wait: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """The job's events, the oldest first, as they come; ends with the job."""
    seen: set[str] = set()
    while True:
        over = service.document("GET", f"/v1/fine_tuning/jobs/{job}")["status"] in FINISHED
        for event in reversed(list(pages(service, f"/v1/fine_tuning/jobs/{job}/events"))):
            if event["id"] not in seen:
                seen.add(event["id"])
                yield event
        if over:
            return
        wait(_SECONDS_BETWEEN_LOOKS)


def pages(service: Service, path: str) -> Iterator[dict[str, Any]]:
    """Every element of one of OpenAI's lists."""
    after: dict[str, str] = {}
    while True:
        page = service.document("GET", path, params={"limit": _PAGE, **after})
        elements = page.get("data")
        if not isinstance(elements, list):
            raise IntegrityError(f"{path}: expected a list in the service's answer")
        yield from elements
        if not page.get("has_more") or not elements:
            return
        after = {"after": str(elements[-1]["id"])}


def receipt(service: Service, job: str) -> dict[str, Any]:
    """What the job was, signed by the enclave; `obfuscatune verify-receipt` checks it."""
    return service.document("GET", f"/obfuscatune/v1/jobs/{job}/receipt")


def audit_log(service: Service) -> bytes:
    """The owner's copy of the audit log, others' entries as digests; `obfuscatune verify-log` checks it."""
    return service.request("GET", "/obfuscatune/v1/audit-log").content


def fetch_adapter(service: Service, job: str) -> dict[str, bytes]:
    """The adapter that a job made, in PEFT's format: contents of files by name.

    Raises:
        TermsError: the provider's terms do not let it go, or not without his consent.
        IntegrityError: what came is no adapter.
    """
    content = service.request("GET", f"/obfuscatune/v1/jobs/{job}/adapter").content
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for entry in archive:
                reader = archive.extractfile(entry) if entry.isfile() else None
                if reader is None or not _FILE_NAME.fullmatch(entry.name) or entry.name in files:
                    raise IntegrityError(f"the adapter of {job} holds more than files of its own")
                files[entry.name] = reader.read()
    except tarfile.TarError as error:
        raise IntegrityError(f"the adapter of {job} is no archive: {error}") from error
    if "adapter_config.json" not in files:
        raise IntegrityError(f"the adapter of {job} has no adapter_config.json")
    return files


def write_new_directory(out: Path, files: Mapping[str, bytes]) -> None:
    """A directory that is whole or absent.

    Raises:
        StorageError: it exists, or the disk refuses.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        unfinished.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        unfinished.rename(out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
