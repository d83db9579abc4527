"""The owner's console: what was verified, his data, his jobs, and the models that came of them."""

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response

from obfuscatune.attest.record import to_file_bytes
from obfuscatune.console import owner_compare, owner_data, owner_jobs, owner_log
from obfuscatune.console.assessment import assess, assess_checks
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.records import MOST_FILE_BYTES
from obfuscatune.console.shell import Shell, attachment
from obfuscatune.console.views import Model
from obfuscatune.errors import ConnectionLost

NAVIGATION = (
    ("/", "owner.enclave"),
    ("/data", "owner.data"),
    ("/jobs", "owner.jobs"),
    ("/compare", "owner.compare"),
    ("/log", "owner.log"),
)


def owner_console(connection: OwnerConnection, tell: Callable[[str], None]) -> Shell:
    """The owner's pages.

    Args:
        tell: Says something where the console was started: a new link.
    """

    def about() -> dict[str, Any]:
        """What the frame of each page shows: whether the enclave stands."""
        found, left = connection.found, connection.seconds_left
        simulated = found.record is not None and found.record.simulated
        standing = "refused" if left is None else "simulated" if simulated else "verified"
        return {"standing": standing, "seconds_left": left, "refusal": connection.supervisor.refusal}

    shell = Shell("owner", NAVIGATION, tell, about, connection.supervisor.soon)
    shell.large = {"/data/check": MOST_FILE_BYTES, "/data/upload": MOST_FILE_BYTES}

    @shell.router.get("/")
    def enclave(request: Request) -> Response:
        """Is the enclave what it says?"""
        found, counts = connection.found, connection.seconds_left is not None
        if found.record is None:
            assessment = assess_checks(found.failed)
            verdict = "fails" if found.failed else "unknown"
        else:
            assessment = assess(found.record, counts=counts)
            verdict = assessment.state if counts else "past"
        models: list[Model] | None = None
        if counts:
            try:
                models = owner_jobs.granted_models(connection)
            except ConnectionLost:
                connection.supervisor.soon()
        return shell.page(
            request,
            "owner/enclave.html",
            assessment=assessment,
            verdict=verdict,
            record=found.record,
            enclave=str(connection.enclave),
            enclave_key=found.enclave_key,
            fingerprint=connection.identity.fingerprint,
            models=models,
        )

    @shell.router.get("/standing")
    def standing(request: Request) -> Response:
        """Whether the enclave stands: a part that every page asks for again."""
        return shell.page(request, "parts/standing.html")

    @shell.router.get("/verification.json")
    def verification() -> Response:
        """The verification document, for `obfuscatune verify`."""
        record = connection.found.record
        if record is None:
            raise HTTPException(404)
        return attachment(to_file_bytes(record), "verification.json", "application/json")

    @shell.router.post("/verify")
    def verify() -> Response:
        """Verify again now."""
        connection.supervisor.check()
        return shell.redirect("/")

    owner_data.add(shell, connection)
    owner_jobs.add(shell, connection)
    owner_compare.add(shell, connection)
    owner_log.add(shell, connection)
    return shell
