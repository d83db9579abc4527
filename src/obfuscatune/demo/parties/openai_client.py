"""A client on the owner's machine that knows nothing of enclaves: the official `openai` package, unmodified.

    python -m obfuscatune.demo.parties.openai_client URL SCRIPT.json

does what the script says and prints what came, one JSON document a line. Where `openai` is not installed, httpx sends
the same requests.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

_SECONDS = 300.0
_SECONDS_BETWEEN_LOOKS = 0.5
_ENDED = ("succeeded", "failed", "cancelled")


class Client(Protocol):
    """What the demo asks of a client."""

    def upload(self, path: Path) -> str:
        """Upload a training file; its id."""

    def create_job(self, job: dict[str, Any], recipe: dict[str, Any]) -> str:
        """Start to fine-tune; the job's id."""

    def job(self, job: str) -> dict[str, Any]:
        """The job as it stands."""

    def events(self, job: str) -> list[dict[str, Any]]:
        """Its events, the newest first."""

    def chat(self, request: dict[str, Any]) -> str:
        """An answer, whole."""

    def streamed(self, request: dict[str, Any]) -> Iterator[str]:
        """An answer, in pieces."""


class OfficialClient:
    """OpenAI's own."""

    def __init__(self, url: str) -> None:
        import openai

        self.name = f"openai {openai.__version__}"
        self._client = openai.OpenAI(base_url=url, api_key="none-needed", timeout=_SECONDS, max_retries=0)

    def upload(self, path: Path) -> str:
        """See `Client`."""
        with path.open("rb") as file:
            return self._client.files.create(file=file, purpose="fine-tune").id

    def create_job(self, job: dict[str, Any], recipe: dict[str, Any]) -> str:
        """See `Client`."""
        return self._client.fine_tuning.jobs.create(**job, extra_body={"recipe": recipe}).id

    def job(self, job: str) -> dict[str, Any]:
        """See `Client`."""
        return self._client.fine_tuning.jobs.retrieve(job).model_dump(mode="json")

    def events(self, job: str) -> list[dict[str, Any]]:
        """See `Client`."""
        return [it.model_dump(mode="json") for it in self._client.fine_tuning.jobs.list_events(job, limit=100)]

    def chat(self, request: dict[str, Any]) -> str:
        """See `Client`."""
        return str(self._client.chat.completions.create(**request).choices[0].message.content)

    def streamed(self, request: dict[str, Any]) -> Iterator[str]:
        """See `Client`."""
        for chunk in self._client.chat.completions.create(**request, stream=True):
            yield chunk.choices[0].delta.content or ""


class HttpClient:
    """The same requests by httpx."""

    def __init__(self, url: str) -> None:
        import httpx

        self.name = f"httpx {httpx.__version__}"
        self._http = httpx.Client(base_url=url.rstrip("/") + "/", timeout=_SECONDS, trust_env=False)

    def _send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        reply = self._http.request(method, path, **options).raise_for_status().json()
        return reply if isinstance(reply, dict) else {}

    def upload(self, path: Path) -> str:
        """See `Client`."""
        with path.open("rb") as file:
            files = {"file": (path.name, file, "application/jsonl")}
            return str(self._send("POST", "files", data={"purpose": "fine-tune"}, files=files)["id"])

    def create_job(self, job: dict[str, Any], recipe: dict[str, Any]) -> str:
        """See `Client`."""
        return str(self._send("POST", "fine_tuning/jobs", json={**job, "recipe": recipe})["id"])

    def job(self, job: str) -> dict[str, Any]:
        """See `Client`."""
        return self._send("GET", f"fine_tuning/jobs/{job}")

    def events(self, job: str) -> list[dict[str, Any]]:
        """See `Client`."""
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            after = {"after": found[-1]["id"]} if found else {}
            page = self._send("GET", f"fine_tuning/jobs/{job}/events", params={"limit": 100, **after})
            found += page["data"]
        return found

    def chat(self, request: dict[str, Any]) -> str:
        """See `Client`."""
        return str(self._send("POST", "chat/completions", json=request)["choices"][0]["message"]["content"])

    def streamed(self, request: dict[str, Any]) -> Iterator[str]:
        """See `Client`."""
        with self._http.stream("POST", "chat/completions", json={**request, "stream": True}) as reply:
            for line in reply.raise_for_status().iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def open_client(url: str) -> OfficialClient | HttpClient:
    """The official one where it is installed."""
    try:
        return OfficialClient(url)
    except ImportError:
        return HttpClient(url)


def main(url: str, script: Path) -> None:
    """Ask, fine-tune if the script has a job, ask again."""
    said = json.loads(script.read_text("utf-8"))
    client = open_client(url)
    _tell(client=client.name)
    model = said["model"]
    if said["job"] is not None:
        _tell(before=[client.chat(_question(model, it)) for it in said["questions"]])
        job = client.create_job(
            {**said["job"], "model": model, "training_file": client.upload(Path(said["data"]))}, said["recipe"]
        )
        _tell(job=job)
        model = _follow(client, job)
    _tell(after=[client.chat(_question(model, it)) for it in said["questions"]])
    pieces = list(client.streamed(_question(model, said["questions"][0])))
    _tell(streamed="".join(pieces), pieces=len([it for it in pieces if it]))


def _follow(client: Client, job: str) -> str:
    seen: set[str] = set()
    until = time.monotonic() + _SECONDS
    while True:
        now = client.job(job)
        for event in reversed(client.events(job)):
            if event["id"] not in seen:
                seen.add(event["id"])
                _tell(event=event["message"], data=event["data"])
        if now["status"] in _ENDED or time.monotonic() > until:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if now["status"] != "succeeded":
        sys.exit(f"error: the job is {now['status']}: {now['error']}")
    _tell(model=now["fine_tuned_model"])
    return str(now["fine_tuned_model"])


def _question(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
