"""What the parties do, in order, and what must be refused on the way. `Screen` is told as it happens."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from obfuscatune.demo.parties import refusals
from obfuscatune.demo.parties.programs import COMMAND, CommandFailed, run, run_lines
from obfuscatune.demo.parties.result import Refusal, Scene, Searched, Step
from obfuscatune.demo.parties.stage import MODEL, Stage, core_limit
from obfuscatune.errors import ConnectionLost, IntegrityError, ObfuscaTuneError

CLIENT = (*COMMAND[:-1], "obfuscatune.demo.parties.openai_client")
EPOCHS = {"private": 12, "guarded": 1}
QUESTIONS = {"private": 8, "guarded": 3}
_LOAD_SECONDS = 120.0
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")
"""Told by its first digits."""
_RECIPE = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
_HYPERPARAMETERS = {"batch_size": 4, "learning_rate_multiplier": 25.0}


class Screen(Protocol):
    """Whoever shows the demo."""

    def step(self, step: Step) -> None:
        """A step was taken."""

    def refusal(self, refusal: Refusal) -> None:
        """Something was tried."""

    def doing(self, what: str) -> None:
        """Something that takes a while begins."""

    def searched(self, searched: Searched) -> None:
        """A place was searched."""


@dataclass
class Story:
    """One profile's scene: the stage it is on, and what came of it."""

    stage: Stage
    scene: Scene
    screen: Screen
    epochs: int
    seed: int
    learns: bool
    """Whether so many epochs teach enough to be asked about."""
    client: str = ""
    """The program that alice used, and its version."""
    tuned: str = ""
    """The name of alice's model."""

    @contextmanager
    def step(self, who: str, what: str) -> Iterator[list[str]]:
        """A step; what is appended to the list is told with it."""
        told: list[str] = []
        began = time.perf_counter()
        self.screen.doing(f"{who}: {what}")
        yield told
        step = Step(who, what, ", ".join(told), time.perf_counter() - began)
        self.scene.steps.append(step)
        self.screen.step(step)

    def refused(self, who: str, attempt: str, act: Callable[[], object], because: str) -> None:
        """Something that must be refused, with a reason that matches `because`."""
        self.screen.doing(f"{who}: {attempt}")
        try:
            act()
        except CommandFailed as error:
            reason = error.reason
        except ObfuscaTuneError as error:
            reason = str(error)
        else:
            reason = "it worked"
        told = Refusal(who, attempt, _DIGEST.sub(r"\1…", reason), re.search(because, reason) is not None)
        self.scene.refusals.append(told)
        self.screen.refusal(told)

    def check(self, what: str, holds: bool) -> None:
        """Something that must hold."""
        self.scene.checks[what] = holds

    def play(self) -> None:
        """All of it.

        Raises:
            ObfuscaTuneError: a step failed that should have worked.
        """
        self._prepare()
        if self.stage.profile == "private":
            refusals.before_the_grant(self)
        else:
            refusals.of_mask_workers(self)
        self._grant()
        if self.stage.profile == "private":
            refusals.after_the_grant(self)
        job = self._use()
        self._take_home(job)
        if self.stage.profile == "private":
            self._restart(job)
        self._look_at_processes()

    def _prepare(self) -> None:
        stage = self.stage
        with self.step("all", "make their keys"):
            stage.make_keys()
        with self.step("provider", "seals the model; the bundle lies on the cloud's disk") as told:
            told.append(f"manifest {stage.seal_model()['manifest'][:16]}…")
        with self.step("alice", "has notes that nobody else may read"):
            stage.write_data()
        guarded = stage.profile == "guarded"
        with self.step("cloud", "starts a worker" + (", and the provider one for masks" if guarded else "")):
            stage.start_workers()
        with self.step("cloud", "starts the enclave, which holds no key") as told:
            told.append(f"attested channel at {stage.start_enclave()['channel']}")
        for party in ("provider", "alice", "bob", "mallory"):
            stage.write_policy(party)

    def _grant(self) -> None:
        stage = self.stage
        with self.step("provider", "verifies the enclave and grants the model to alice and bob") as told:
            told.append(f"grant {stage.grant()['grant'][:16]}…")
        with self.step("cloud", "loads the model: large matrices go to the worker, transformed"):
            self.wait_for_model(MODEL, "ready")

    def wait_for_model(self, name: str, status: str) -> str:
        """Wait until a model has a status; the reason that the provider is told with it.

        Raises:
            ConnectionLost: it did not come.
        """
        stage = self.stage
        until = time.monotonic() + _LOAD_SECONDS
        told: dict[str, Any] = {}
        while time.monotonic() < until:
            said = run(stage["provider"], "provider", "status", *stage.options("provider"), "--json")
            told = next((it for it in json.loads(said)["models"] if it["model"] == name), {})
            if told.get("status") in (status, "failed"):
                break
        if told.get("status") != status:
            raise ConnectionLost(f"the model {name} is {told.get('status')}: {told.get('reason')}")
        return str(told.get("reason"))

    def _use(self) -> str:
        """Alice verifies, uploads, trains and asks; the job's id."""
        stage, scene = self.stage, self.scene
        known, codes = list(stage.known.items()), list(stage.codes.items())
        asked = dict([*known[: QUESTIONS[stage.profile] - 1], codes[0]])
        hyperparameters = {"n_epochs": self.epochs, **_HYPERPARAMETERS}
        script = {
            "model": MODEL,
            "data": str(stage.data),
            "questions": list(asked),
            "recipe": _RECIPE,
            "job": {
                "seed": self.seed,
                "suffix": "notes",
                "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            },
        }
        path = stage["alice"].folder / "script.json"
        path.write_text(json.dumps(script), "utf-8")
        with ExitStack() as proxy:
            with self.step("alice", "starts a proxy, which verifies the enclave and releases her key") as told:
                url = proxy.enter_context(stage.proxy())
                told.append(url)
            with self.step("alice", "uploads, fine-tunes and asks through it") as told:
                found: dict[str, Any] = {}
                for line in run_lines(stage["alice"], url, str(path), module=CLIENT):
                    said = json.loads(line)
                    if "event" in said:
                        self.screen.doing(f"alice: {said['event']}")
                        scene.losses += [said["data"]["train_loss"]] if said["data"] else []
                    found |= said
                told.append(str(found["client"]))
                told.append(f"loss {scene.losses[0]:.3f} -> {scene.losses[-1]:.3f} in {len(scene.losses)} steps")
        self.client = str(found["client"])
        answers = zip(asked.items(), found["before"], found["after"], strict=True)
        scene.answers += [(question, truth.strip(), before, after) for (question, truth), before, after in answers]
        self.check("the streamed answer is the one that came whole", found["streamed"] == found["after"][0])
        self.check("training lowered the loss", min(scene.losses[-3:]) < scene.losses[0])
        if stage.profile == "private" and self.learns:
            self.check("most questions are answered right after fine-tuning", scene.right > len(asked) / 2)
        self.tuned = str(found["model"])
        return str(found["job"])

    def _take_home(self, job: str) -> None:
        """The adapter, by consent; the receipt and the audit log, verified."""
        stage = self.stage
        adapter, alice = stage["alice"].folder / "adapter", stage["alice"].folder
        fetch = ("fetch-adapter", "--job", job, "--out", adapter)
        if stage.profile == "private":
            refusals.of_other_owners(self, job)
        self.refused(
            "alice", "takes her adapter home without consent", lambda: stage.owner("alice", *fetch), "not consented"
        )
        with self.step("provider", "consents that this adapter leaves, to alice"):
            whose = ("--owner", alice / "keys" / "cert.pem", "--adapter", self.tuned)
            model = ("--name", MODEL, "--key-file", stage.key)
            run(stage["provider"], "provider", "consent", *stage.options("provider"), *model, *whose)
        with self.step("alice", "takes her adapter home"):
            stage.owner("alice", *fetch)
        if stage.profile == "private":
            with self.step("all", "hold its answer against `obfuscatune generate`, plain") as told:
                told.append(self._compare(adapter))
        receipt, log = alice / "receipt.json", alice / "audit.jsonl"
        with self.step("alice", "fetches the receipt and the audit log, and verifies both") as told:
            key = self._verify_documents(job, receipt, log, told)
        if stage.profile == "private":
            refusals.of_changed_documents(self, receipt, log, key)

    def _verify_documents(self, job: str, receipt: Path, log: Path, told: list[str]) -> str:
        """Fetch and verify both; the key that signed them."""
        stage, alice = self.stage, self.stage["alice"]
        stage.owner("alice", "receipt", "--job", job, "--out", receipt)
        stage.owner("alice", "audit-log", "--out", log)
        against = ("--policy", alice.folder / "policy.yaml", "--adapter", alice.folder / "adapter")
        said = json.loads(run(alice, "verify-receipt", receipt, *against, "--json"))["receipt"]
        key = str(said["claims"]["signing_key"])
        entries = json.loads(run(alice, "verify-log", log, "--key", key, "--json"))["count"]
        products, masks = said["products"], said["masks"]
        told.append(f"{products['requests']:,} products, {products['verified']:,} of them verified, {entries} entries")
        if stage.profile == "guarded":
            told.append(f"{masks['rows']:,} rows under masks")
            every = products["verified"] >= products["requests"] > 0
            self.check("every product was verified, and the masks are accounted for", every and masks["rows"] > 0)
        return key

    def _compare(self, adapter: Path) -> str:
        """Whether the service's answer is that of the command line, in this process's hands: it may see everything."""
        stage = self.stage
        question, _, _, answered = self.scene.answers[0]
        plain = ("generate", "--model", stage.model, "--adapter", adapter, "--plain", "--json")
        length = ("--max-new-tokens", 12)
        prompt = f"Question: {question}\nAnswer:"
        text = str(json.loads(run(stage["provider"], *plain, "--prompt", prompt, *length))["text"]).removeprefix(prompt)
        self.check("the service's answer is that of `obfuscatune generate`", text == answered)
        return f"both say {answered.strip()!r}" if text == answered else f"{text!r} and {answered!r}"

    def _restart(self, job: str) -> None:
        stage = self.stage
        with self.step("cloud", "kills the enclave, and starts it again"):
            stage.servers["enclave"].kill()
            stage.start_enclave()
        locked = "no grant|not released"
        self.refused(
            "alice",
            "asks for her jobs before the keys were released again",
            lambda: stage.owner("alice", "jobs"),
            locked,
        )
        with self.step("provider", "verifies and grants again"):
            stage.grant()
        with self.step("alice", "verifies, releases her key again, and finds her job") as told:
            listed = json.loads(stage.owner("alice", "jobs", "--json"))
            told.append(", ".join(f"{it['id']} {it['status']}" for it in listed) or "none")
        self.check("the job is there after a restart", [it["id"] for it in listed] == [job])

    def _look_at_processes(self) -> None:
        """What the system tells of the enclave while it runs, where it has a /proc."""
        stage = self.stage
        if sys.platform != "linux":
            return
        enclave = stage.servers["enclave"]
        limit = core_limit(enclave.pid)
        self.check("the enclave's core dumps have 0 bytes", limit == "0 0")
        # Arguments and environment, as `ps` shows them: searched with all else.
        for name in ("cmdline", "environ"):
            try:
                shutil.copyfile(f"/proc/{enclave.pid}/{name}", stage["mallory"].folder / f"enclave.{name}")
            except OSError as error:
                if name == "cmdline":
                    raise IntegrityError(f"the enclave's arguments cannot be read: {error}") from error
