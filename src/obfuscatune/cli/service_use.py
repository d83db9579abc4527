"""`obfuscatune owner proxy`, `submit`, `jobs`, `fetch-adapter`, `receipt`: use a service that was verified first."""

import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from obfuscatune.cli import options, output
from obfuscatune.cli.attested import ENCLAVE, EnclaveOptions, parse_enclave
from obfuscatune.errors import ConfigError, TermsError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.client.connection import Service
    from obfuscatune.client.heads import HeadFile
    from obfuscatune.protocol.addresses import TcpAddress

Job = Annotated[str, Option("The job's id, as ftjob-...; `owner jobs` lists them.")]


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(EnclaveOptions):
    """`EnclaveOptions`, and where the API is."""

    api: Annotated[str | None, Option("Its API, as enclave.example:8443.", ENCLAVE, unset="where the enclave says")] = (
        None
    )
    heads: Annotated[
        Path | None,
        Option(
            "Folder of the newest audit-log heads that were seen.", ENCLAVE, unset="heads, in the identity's folder"
        ),
    ] = None

    @property
    def head_file(self) -> "HeadFile":
        """Where the newest head of this enclave's audit log is kept."""
        from obfuscatune.client.heads import HeadFile

        return HeadFile(self.heads or self.identity / "heads", self.enclave.removeprefix("tcp:"))

    @property
    def api_address(self) -> "TcpAddress | None":
        """Raises ConfigError: it is no address."""
        return None if self.api is None else parse_enclave(self.api, "--api")

    @contextmanager
    def service(self) -> "Iterator[Service]":
        """The service, verified and with the owner's key. What was checked is told first.

        Raises:
            As `EnclaveOptions.connected` and `client.connection.use`.
        """
        from obfuscatune.client.connection import use

        api, enclave = self.api_address, parse_enclave(self.enclave)
        with (
            self.connected() as (session, identity),
            use(session, enclave, identity, api=api, heads=self.head_file) as service,
        ):
            yield service


def proxy(
    *,
    on: ServiceOptions,
    port: Annotated[int, Option("Of 127.0.0.1; 0 takes any that is free.", least=0, most=65535)] = 8000,
    api_key: Annotated[
        bool, Option("Ask local clients for a key, which is printed: other users of this machine are kept out.")
    ] = False,
) -> None:
    """Speak plain OpenAI to any client on this machine, and forward it to an enclave that your policy accepts.

    The enclave is verified before the first request and again while the proxy runs, and its audit log must go on from
    what was seen of it. The moment that fails, everything is refused. Then:
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 in the client's environment.
    """
    import uvicorn

    from obfuscatune.client.connection import open_api
    from obfuscatune.client.proxy import Standing, Supervisor, make_app

    connect, identity = on.connector()
    enclave, api, heads = parse_enclave(on.enclave), on.api_address, on.head_file
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there: {error.strerror or error}") from error

    def verify() -> Standing:
        began = time.monotonic()
        opened = open_api(connect(), enclave, identity, api=api, heads=heads)
        left = opened.verified.expires - opened.verified.time
        spki = opened.verified.claims.http_key
        return Standing(opened.url, spki, opened.context, began + left, opened.check_log)

    with listening:
        with on.connected():  # which says what was checked, and ends the command where it fails
            pass
        supervisor = Supervisor(verify, output.notice)
        if not supervisor.check() or supervisor.standing() is None:
            raise TermsError(supervisor.refusal)
        key = secrets.token_urlsafe(24) if api_key else None
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        output.write_text(f"OPENAI_BASE_URL={url}\nOPENAI_API_KEY={key or 'none-needed'}")
        config = uvicorn.Config(make_app(supervisor, key=key), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


def submit(
    *,
    on: ServiceOptions,
    data: Annotated[Path, Option("Records to train on: JSONL of chats, or of prompts and completions.")],
    model: Annotated[str, Option("The model's name, as the provider granted it.")],
    validation: Annotated[Path | None, Option("Records to measure on.")] = None,
    epochs: Annotated[int | None, Option("Passes over the data.", unset="3", least=1)] = None,
    batch_size: Annotated[int | None, Option("Records a step.", unset="8", least=1)] = None,
    learning_rate_multiplier: Annotated[float | None, Option("Of the recipe's learning rate.", unset="1")] = None,
    suffix: Annotated[str | None, Option("Part of the tuned model's name.")] = None,
    seed: Annotated[int | None, Option("Of the run.", unset="drawn", least=0)] = None,
    watch: Annotated[bool, Option("Show events until the job has ended.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Upload a data set to a verified enclave, and fine-tune on it.

    The data leaves this machine for the enclave alone, under a key that its evidence names.
    """
    from obfuscatune.client import jobs as api

    if not data.is_file():
        raise ConfigError(f"--data {data}: there is no such file")
    given = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate_multiplier": learning_rate_multiplier}
    hyperparameters = {name: value for name, value in given.items() if value is not None}
    with on.service() as service:
        with output.progress("uploading"):
            job = api.submit(
                service, data, model, hyperparameters=hyperparameters, suffix=suffix, seed=seed, validation=validation
            )
        if watch:
            output.notice(f"job {job['id']}")
            for event in api.events(service, job["id"]):
                output.notice(_event_line(event))
            job = service.document("GET", f"/v1/fine_tuning/jobs/{job['id']}")
    output.write_result(job, _job_line(job), as_json=as_json)
    if watch and job["status"] != "succeeded":
        raise TermsError(f"the job {job['status']}: {output.printable((job.get('error') or {}).get('message') or '')}")


def jobs(*, on: ServiceOptions, as_json: options.AsJson = False) -> None:
    """List your jobs, the newest first."""
    from obfuscatune.client import jobs as api

    with on.service() as service:
        found = api.list_jobs(service)
    output.write_result(found, "\n".join(map(_job_line, found)) or "no jobs", as_json=as_json)


def fetch_adapter(
    *,
    on: ServiceOptions,
    job: Job,
    out: Annotated[Path, Option("A new folder, for an adapter in PEFT's format.")],
) -> None:
    """Take the adapter of a job home, where the provider's terms allow it."""
    from obfuscatune.client import jobs as api

    if out.exists():
        raise ConfigError(f"--out {out} exists and is not overwritten: choose another folder")
    with on.service() as service, output.progress("fetching"):
        files = api.fetch_adapter(service, job)
    api.write_new_directory(out, files)
    output.write_text(f"{out}: {', '.join(sorted(files))}")


def receipt(
    *, on: ServiceOptions, job: Job, out: Annotated[Path | None, Option("A new file.", unset="stdout")] = None
) -> None:
    """Fetch what the enclave signed of a job, for auditors and customers: `obfuscatune verify-receipt` checks it."""
    from obfuscatune.client import jobs as api
    from obfuscatune.documents import canonical

    with on.service() as service:
        content = canonical(api.receipt(service, job))
    _write(content, out)


def audit_log(*, on: ServiceOptions, out: Annotated[Path | None, Option("A new file.", unset="stdout")] = None) -> None:
    """Fetch your copy of the enclave's audit log: `obfuscatune verify-log` checks it."""
    from obfuscatune.client import jobs as api

    with on.service() as service:
        content = api.audit_log(service)
    _write(content, out)


def _write(content: bytes, out: Path | None) -> None:
    if out is None:
        output.write_text(content.decode())
    else:
        output.write_file(out, content)


def _job_line(job: dict[str, Any]) -> str:
    tuned = job.get("fine_tuned_model")
    words = (str(job.get("id")), str(job.get("status")), str(job.get("model")), *([f"-> {tuned}"] if tuned else []))
    return output.printable("  ".join(words))


def _event_line(event: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(int(event["created_at"]), UTC)
    return f"{at:%H:%M:%S}  {output.printable(event['message'])}"
