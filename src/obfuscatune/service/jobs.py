"""Jobs of fine-tuning: which runs next, each in a process of its own, and what came of it.

queued -> running -> succeeded | failed | cancelled, with paused between. A job runs when its owner's key and its model
are here. What ends a service or a trainer leaves the job queued, and it goes on from its newest checkpoint. Everything
that is written when a job ends has an id that follows from the job's: written twice, it is there once.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from obfuscatune.errors import DataError, ObfuscaTuneError, TermsError
from obfuscatune.service import tables as rows
from obfuscatune.service.job_process import JobProcess
from obfuscatune.service.job_results import Outcome, results_csv
from obfuscatune.service.keys import Owner
from obfuscatune.service.models import READY
from obfuscatune.service.state import Row, new_id
from obfuscatune.service.tables import CANCELLED, ENDED, FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED

if TYPE_CHECKING:
    from obfuscatune.service.api.context import Context

log = logging.getLogger(__name__)
_LEARNING_RATE = 2e-4
"""That a `learning_rate_multiplier` multiplies: the recipe's own."""
_WAIT_AFTER_FAILURE_S, _LONGEST_WAIT_S = 5.0, 60.0
_LOOK_EVERY_S = 30.0
_BLAMELESS = "The job will be started again."


class Jobs:
    """Starts, watches and stops jobs. Safe from any thread."""

    def __init__(self, record: Callable[["Context", Owner, Row, Outcome], None]) -> None:
        """
        Args:
            record: writes a job's receipt; called before the job counts as succeeded.
        """
        self._record = record
        self._context: Context | None = None
        self._changed = threading.Condition()
        self._running: dict[str, JobProcess] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._not_before: dict[str, float] = {}
        self._served: dict[str, float] = {}
        self._stopping = False
        self._threads: list[threading.Thread] = []

    @property
    def context(self) -> "Context":
        """The service's parts."""
        if self._context is None:
            raise RuntimeError("jobs were not started")
        return self._context

    def start(self, context: "Context") -> None:
        """Begin to run what is queued."""
        self._context = context
        context.state.requeue_running()
        scheduler = threading.Thread(target=self._schedule, name="jobs", daemon=True)
        self._threads.append(scheduler)
        scheduler.start()

    def wake(self) -> None:
        """Something came that a job may have waited for."""
        with self._changed:
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> None:
        """Have every job write a checkpoint and end; those that do not in time are killed, and lose steps alone."""
        with self._changed:
            self._stopping = True
            running = list(self._running.values())
            self._changed.notify_all()
        for process in running:
            process.stop()
        deadline = time.monotonic() + timeout_s
        for process in running:
            process.wait(max(0.1, deadline - time.monotonic()))
        for thread in self._threads:
            thread.join()

    def ask(self, owner: Owner, row: Row, wanted: str) -> bool:
        """Cancel, pause or resume a job; whether its status allowed it."""
        state = self.context.state
        if wanted == QUEUED:
            moved = state.move_job(row.id, (PAUSED,), QUEUED, attempts=0)
            self.wake()
            return moved
        with self._changed:
            process = self._running.get(row.id)
            if process is not None:
                process.asked = wanted
        if process is not None:
            process.stop(at_once=wanted == CANCELLED)
            process.settled.wait(60.0)
        details = {**row.details, "finished_at": int(time.time())} if wanted == CANCELLED else row.details
        before = (QUEUED, PAUSED) if wanted == CANCELLED else (QUEUED,)
        if state.move_job(row.id, before, wanted, owner=owner, details=details):
            self.tell(owner, row.id, f"The job has been {wanted}")
            return True
        found = state.get(rows.jobs, owner, row.id)
        return found is not None and found.clear["status"] == wanted and process is not None

    def tell(
        self,
        owner: Owner,
        job: str,
        message: str,
        *,
        level: str = "info",
        data: Mapping[str, Any] | None = None,
        row_id: str | None = None,
    ) -> None:
        """Add an event to a job; one of that id is there once."""
        details = {"level": level, "message": message, "type": "message" if data is None else "metrics", "data": data}
        self.context.state.add(rows.events, owner, row_id or new_id("ftevent-"), details, job=job)

    def remove_adapter(self, owner: Owner, row_id: str, job: str) -> None:
        """Delete what a job made, and its checkpoints."""
        state = self.context.state
        while page := state.page(rows.checkpoints, owner, limit=100, job=job).rows:
            for row in page:
                state.remove(rows.checkpoints, owner, row.id)
        state.remove(rows.adapters, owner, row_id)
        self._remove_run(job)

    def running(self) -> int:
        """How many run now."""
        with self._changed:
            return len(self._running)

    def progress(self, job: str) -> dict[str, Any] | None:
        """How far a job is that runs; None where it does not."""
        with self._changed:
            outcome = self._outcomes.get(job)
        return None if outcome is None else outcome.progress()

    def products(self) -> int:
        """Requests to the worker of the jobs that run, so far."""
        with self._changed:
            running = list(self._outcomes.values())
        return sum(it.progress()["products"]["requests"] for it in running)

    def _schedule(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                room = len(self._running) < self.context.settings.limits.jobs_at_once
            try:
                self._enforce()
                started = room and self._start_next()
            except ObfuscaTuneError as error:
                log.warning("jobs: %s", error)
                started = False
            if not started:
                with self._changed:
                    now = time.monotonic()
                    waits = [at - now for at in self._not_before.values() if at > now]
                    if not self._stopping:
                        self._changed.wait(min([*waits, _LOOK_EVERY_S]))

    def _enforce(self) -> None:
        """Stop jobs whose model was taken back, or whose grant is over; they wait until it is granted anew, or fail."""
        with self._changed:
            running = list(self._running.values())
        for process in running:
            if self.context.models.get(process.model) is None or not self.context.access.allows_job(
                process.model, process.owner
            ):
                process.stop(at_once=True)

    def _start_next(self) -> bool:
        """Start the oldest job of the owner who was served longest ago; whether there was one."""
        context, now = self.context, time.monotonic()
        ready: dict[str, str] = {}
        for job, owner, model, _ in context.state.waiting_jobs():
            served = context.models.get(model)
            is_here = context.owners.get(owner) is not None and served is not None and served.status == READY
            if is_here and owner not in ready and now >= self._not_before.get(job, 0.0) and job not in self._running:
                ready[owner] = job
        if not ready:
            return False
        spki = min(ready, key=lambda it: self._served.get(it, 0.0))
        job, self._served[spki] = ready[spki], now
        found = context.owners.get(spki)
        row = None if found is None else context.state.get(rows.jobs, found, job)
        if found is None or row is None or not context.state.move_job(job, (QUEUED,), RUNNING):
            return False
        context.log.append(spki, "job-started", {"job": job, "attempt": row.clear["attempts"]})
        process = JobProcess(job, spki, row.clear["model"])
        with self._changed:
            self._running[job] = process
        thread = threading.Thread(target=self._run, args=(found, row, process), name=f"job {job}", daemon=True)
        self._threads = [it for it in self._threads if it.is_alive()] + [thread]
        thread.start()
        return True

    def _run(self, owner: Owner, row: Row, process: JobProcess) -> None:
        try:
            outcome = self._follow(owner, row, process)
            self._settle(owner, row, process, outcome)
        except (TermsError, DataError) as error:
            self._fail(owner, row, Outcome({}), type(error).__name__, str(error))
        except ObfuscaTuneError as error:
            log.warning("job %s: %s", row.id, error)
            self._again(owner, row, f"{type(error).__name__}")
        except Exception as error:  # noqa: BLE001  a job must not end the service
            log.warning("job %s: unexpected %s", row.id, type(error).__name__)
            self._again(owner, row, "internal error")
        finally:
            process.end()
            with self._changed:
                self._running.pop(row.id, None)
                self._outcomes.pop(row.id, None)
                self._changed.notify_all()
            process.settled.set()

    def _follow(self, owner: Owner, row: Row, process: JobProcess) -> Outcome:
        """Start the trainer, and take in what it tells until it ends."""
        self.context.access.check_job(row.clear["model"], owner.spki)
        process.start(self.context, owner, row, recipe_of(row.details))
        with self._changed:
            if self._stopping or process.asked:
                process.stop()
        outcome = Outcome(dict(row.details.get("products") or {}))
        with self._changed:
            self._outcomes[row.id] = outcome
        for event in process.events():
            self._take(owner, row, process, outcome, event)
        return outcome

    def _take(self, owner: Owner, row: Row, process: JobProcess, outcome: Outcome, event: dict[str, Any]) -> None:
        outcome.take(event)
        job = row.id
        match event["kind"]:
            case "started":
                if not row.clear["charged"]:
                    self.context.access.charge_job(job, row.clear["model"], owner.spki, event["tokens"])
                    self.context.metrics.tokens.labels("training").inc(event["tokens"])
                first = event["first_step"]
                message = "Fine-tuning job started" if not first else f"Fine-tuning job goes on after step {first}"
                self.tell(owner, job, message)
            case "step":
                data = {"step": event["step"], "total_steps": outcome.total_steps, "train_loss": event["loss"]}
                message = f"Step {event['step']}/{outcome.total_steps}: training loss={event['loss']:.4f}"
                self.tell(owner, job, message, data=data, row_id=f"ftevent-{job[6:]}-s{event['step']}")
            case "measured":
                data = {"step": event["step"], "total_steps": outcome.total_steps, "full_valid_loss": event["loss"]}
                message = f"Step {event['step']}/{outcome.total_steps}: full validation loss={event['loss']:.4f}"
                self.tell(owner, job, message, data=data, row_id=f"ftevent-{job[6:]}-v{event['step']}")
            case "checkpoint":
                self._checkpoint(owner, row, outcome, event["step"])
            case "notice":
                log.warning("job %s: %s", job, event["text"])

    def _checkpoint(self, owner: Owner, row: Row, outcome: Outcome, step: int) -> None:
        from obfuscatune.service.api.fine_tuning import fine_tuned_name

        state = self.context.state
        name = fine_tuned_name(row.clear["model"], owner.spki, row.details["suffix"], row.id)
        metrics = {"step": step, "train_loss": outcome.losses.get(step), "full_valid_loss": outcome.measured.get(step)}
        details = {"step": step, "metrics": metrics, "model": f"{name}:ckpt-step-{step}"}
        state.add(rows.checkpoints, owner, f"ftckpt_{row.id[6:]}-{step}", details, job=row.id)
        state.change(rows.jobs, owner, row.id, {**row.details, "products": outcome.products})
        kept = state.page(rows.checkpoints, owner, limit=100, job=row.id).rows
        for old in kept[_CHECKPOINTS_KEPT:]:
            self.context.models.withdraw_adapter(old.details["model"])
            state.remove(rows.checkpoints, owner, old.id)

    def _settle(self, owner: Owner, row: Row, process: JobProcess, outcome: Outcome) -> None:
        """What became of a job whose trainer has ended."""
        if outcome.is_done:
            sent, served = outcome.done["uploads"], outcome.done["served"]
            log.info("job %s: %d matrices were sent to the worker, which had %d already", row.id, sent, served)
            self._succeed(owner, row, outcome)
            return
        if process.asked is not None:
            self._end(owner, row, outcome, process.asked, f"The job has been {process.asked}")
            return
        if outcome.failure is None or outcome.failure["again"]:
            reason = "the trainer ended" if outcome.failure is None else str(outcome.failure["message"])
            is_there = self.context.models.get(process.model) is not None
            self._again(owner, row, reason, outcome, counts=is_there and not (self._stopping or outcome.is_stopped))
            return
        self._fail(owner, row, outcome, str(outcome.failure["code"]), str(outcome.failure["message"]))

    def _again(
        self, owner: Owner, row: Row, reason: str, outcome: Outcome | None = None, *, counts: bool = True
    ) -> None:
        """Queue a job that failed through no fault of its own, unless it has too often."""
        attempts = int(row.clear["attempts"]) + counts
        if attempts >= self.context.settings.limits.job_attempts:
            self._fail(owner, row, outcome or Outcome({}), "worker_failure", reason)
            return
        with self._changed:
            wait_s = min(_WAIT_AFTER_FAILURE_S * attempts, _LONGEST_WAIT_S) if counts else 0.0
            self._not_before[row.id] = time.monotonic() + wait_s
        if counts:
            self.tell(owner, row.id, f"{reason}. {_BLAMELESS}", level="warn")
        self.context.state.move_job(row.id, (RUNNING,), QUEUED, attempts=attempts)

    def _fail(self, owner: Owner, row: Row, outcome: Outcome, code: str, message: str) -> None:
        error = {"code": code, "message": message, "param": None}
        self._end(owner, row, outcome, FAILED, f"The job failed: {message}", error=error)

    def _end(self, owner: Owner, row: Row, outcome: Outcome, status: str, message: str, **changes: Any) -> None:
        details = {**row.details, "products": outcome.products or row.details["products"], **changes}
        if status in ENDED:
            details["finished_at"] = int(time.time())
        if self.context.state.move_job(row.id, (RUNNING,), status, owner=owner, details=details):
            self.tell(owner, row.id, message, level="error" if status == FAILED else "info")
            self.context.log.append(owner.spki, f"job-{status}", {"job": row.id})
        if status in (FAILED, CANCELLED):
            self._remove_run(row.id)

    def _succeed(self, owner: Owner, row: Row, outcome: Outcome) -> None:
        from obfuscatune.service.api.files import RESULTS, store
        from obfuscatune.service.api.fine_tuning import fine_tuned_name
        from obfuscatune.training.adapter import CONFIG, WEIGHTS

        context, model = self.context, row.clear["model"]
        served = context.models.get(model)
        if served is None:
            self._again(owner, row, "the model was taken back", counts=False)
            return
        directory = context.models.run_directory(served, owner.spki, row.id)
        outcome.adapter = {
            name: hashlib.sha256(directory.read(f"adapter/{name}")).hexdigest() for name in (WEIGHTS, CONFIG)
        }
        metrics = results_csv(directory.read("metrics.jsonl"))
        outcome.losses_digest = hashlib.sha256(metrics).hexdigest()
        name = fine_tuned_name(model, owner.spki, row.details["suffix"], row.id)
        result = store(context, owner, f"file-{row.id[6:]}", metrics, RESULTS, "step_metrics.csv")
        details = {"model": name, "sha256": outcome.adapter}
        context.state.add(rows.adapters, owner, row.id[6:], details, job=row.id, model=model)
        self._record(context, owner, row, outcome)
        changes = {"fine_tuned_model": name, "trained_tokens": outcome.tokens, "result_files": [result.id]}
        self.tell(owner, row.id, f"New fine-tuned model created: {name}", row_id=f"ftevent-{row.id[6:]}-m")
        self._end(owner, row, outcome, SUCCEEDED, "The job has successfully completed", **changes)

    def _remove_run(self, job: str) -> None:
        import shutil

        shutil.rmtree(self.context.models.run_root(job), ignore_errors=True)


_CHECKPOINTS_KEPT = 3


def recipe_of(details: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a job, as `Recipe` takes it."""
    asked = details["hyperparameters"]
    recipe: dict[str, Any] = {
        "epochs": asked["n_epochs"],
        "batch_size": asked["batch_size"],
        "lr": _LEARNING_RATE * asked["learning_rate_multiplier"],
        "seed": details["seed"],
        "checkpoint_every": "epoch",
        "checkpoints_kept": _CHECKPOINTS_KEPT,
    }
    return {**recipe, **details["recipe"]}
