"""The process of one job, as the service sees it: started, told to stop, its events read. See `trainer`."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from obfuscatune.errors import DataError, ServiceError
from obfuscatune.secret_memory import secret_view
from obfuscatune.service import tables as rows
from obfuscatune.service.keys import Owner, job_key
from obfuscatune.service.state import Row
from obfuscatune.service.trainer import FRAME, STOP

if TYPE_CHECKING:
    from obfuscatune.service.api.context import Context

log = logging.getLogger(__name__)
MOST_LINE_BYTES = 2**20


class JobProcess:
    """A trainer. `start` and `events` are for one thread; `stop` and `wait` for any."""

    def __init__(self, job: str, owner: str, model: str) -> None:
        self.job, self.owner, self.model = job, owner, model
        self.asked: str | None = None
        """The status that the owner wants the job to have."""
        self.settled = threading.Event()
        """Set once the job's status is written."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended = False

    def start(self, context: "Context", owner: Owner, row: Row, recipe: dict[str, Any]) -> None:
        """Start it, and hand over what it needs.

        Raises:
            ServiceError: the model was taken back.
            DataError: a file of the job's is not there any more.
            StorageError, IntegrityError: it cannot be read.
        """
        model = context.models.get(row.clear["model"])
        if model is None:
            raise ServiceError("the model was taken back")
        training = _content(context, owner, row.details["training_file"])
        validation = row.details["validation_file"]
        eval_content = b"" if validation is None else _content(context, owner, validation)
        about = {
            "id": row.id,
            "settings": context.settings.model_dump(mode="json"),
            "model": model.grant.model,
            "storage": model.grant.storage,
            "manifest": model.grant.manifest,
            "provider": model.grant.provider,
            "root": str(context.models.run_root(row.id)),
            "recipe": recipe,
            "has_validation": validation is not None,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "obfuscatune.service.trainer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ),
        )
        with self._lock:
            self._process = process
        with contextlib.suppress(BrokenPipeError):  # it ended: its events say so
            self._send(json.dumps(about).encode())
            with job_key(owner, model.key.secret, row.id) as derived:
                for secret in (model.key.secret, model.root_key, derived):
                    with secret_view(secret) as view:
                        self._send(view)
            self._send(training)
            self._send(eval_content)

    def _send(self, content: "bytes | memoryview") -> None:
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.write(FRAME.pack(len(content)))
        self._process.stdin.write(content)
        self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it tells, until it ends."""
        if self._process is None or self._process.stdout is None:
            return
        while line := self._process.stdout.readline(MOST_LINE_BYTES):
            try:
                event = json.loads(line)
            except ValueError:
                log.warning("job %s: its trainer told something that is none of its events", self.job)
                return
            yield event

    def stop(self, *, at_once: bool = False) -> None:
        """Have it write a checkpoint and end; or end it as it stands."""
        with self._lock:
            process = self._process
            if process is None or self._ended:
                return
            if at_once:
                process.kill()
                return
            with contextlib.suppress(OSError, ValueError):
                self._send(STOP)

    def wait(self, timeout_s: float) -> None:
        """Wait until its outcome is written; after that time it is killed."""
        if not self.settled.wait(timeout_s):
            self.stop(at_once=True)
            self.settled.wait(timeout_s)

    def end(self) -> None:
        """Have it gone."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _content(context: "Context", owner: Owner, file_id: str) -> bytes:
    from obfuscatune.service.api.files import content_of

    row = context.state.get(rows.files, owner, file_id)
    if row is None:
        raise DataError(f"{file_id}: the file is not there any more")
    return content_of(context, owner, row)
