"""What a service answers, read strictly into what pages show. A page gets these, and never a document as it came."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from obfuscatune.channel.grants import EXPORTS, USES
from obfuscatune.client.jobs import FINISHED
from obfuscatune.console.pages import text
from obfuscatune.errors import IntegrityError

STATUSES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
_MOST_TEXT = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A model that a grant names, and what its terms allow."""

    name: str
    grant: str
    manifest: str
    status: str
    owners: tuple[str, ...]
    uses: tuple[str, ...]
    export: str
    until: str
    tokens: int | None
    used: int
    consents: tuple[str, ...] = ()
    """Adapters that may leave, of those that need a consent."""
    asked: tuple[tuple[str, str], ...] = ()
    """(owner, adapter) of each consent that is waited for, as its provider is told."""
    waiting: tuple[str, ...] = ()
    """Adapters that wait for a consent, as their owner is told."""
    reason: str = ""
    chats: bool = False
    """Whether its tokenizer has a chat template; not known of one that is not loaded."""

    @property
    def left(self) -> int | None:
        """Tokens; None for any number."""
        return None if self.tokens is None else max(0, self.tokens - self.used)

    @property
    def share(self) -> int:
        """Per cent of the tokens that are used."""
        return 0 if not self.tokens else min(100, round(100 * self.used / self.tokens))

    @classmethod
    def read(cls, document: Any) -> "Model":
        """Raises IntegrityError: it is none."""
        it = _object(document)
        terms = _object(it.get("terms"))
        tokens = terms.get("tokens")
        return cls(
            name=_text(it.get("model")),
            grant=_text(it.get("grant")),
            manifest=_text(it.get("manifest")),
            status=_text(it.get("status")),
            owners=tuple(map(_text, _list(terms.get("owners")))),
            uses=tuple(use for use in map(_text, _list(terms.get("uses"))) if use in USES),
            export=_one_of(terms.get("export"), EXPORTS),
            until=_text(terms.get("until")),
            tokens=None if tokens is None else _count(tokens),
            used=_count(it.get("tokens_used")),
            consents=tuple(map(_text, _list(it.get("consented", [])))),
            asked=tuple((_text(_object(a).get("owner")), _text(a.get("adapter"))) for a in _list(it.get("asked", []))),
            waiting=tuple(map(_text, _list(it.get("waiting", [])))),
            reason=_text(it.get("reason", "")),
            chats=it.get("chat_template") is True,
        )


@dataclass(frozen=True)
class StoredFile:
    """A file that lies sealed at the service."""

    id: str
    name: str
    size: int
    created: int
    purpose: str

    @classmethod
    def read(cls, document: Any) -> "StoredFile":
        """Raises IntegrityError: it is none."""
        it = _object(document)
        return cls(
            _identifier(it.get("id")),
            _text(it.get("filename")),
            _count(it.get("bytes")),
            _count(it.get("created_at")),
            _text(it.get("purpose")),
        )


@dataclass(frozen=True)
class Job:
    """A job of fine-tuning."""

    id: str
    status: str
    model: str
    tuned: str | None
    created: int
    finished: int | None
    tokens: int | None
    file: str
    settings: Mapping[str, str]
    error: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens in it."""
        return self.status in FINISHED

    @classmethod
    def read(cls, document: Any) -> "Job":
        """Raises IntegrityError: it is none."""
        it = _object(document)
        settings = _object(it.get("hyperparameters") or {})
        error = it.get("error")
        return cls(
            id=_identifier(it.get("id")),
            status=_one_of(it.get("status"), STATUSES),
            model=_text(it.get("model")),
            tuned=_optional(it.get("fine_tuned_model"), _text),
            created=_count(it.get("created_at")),
            finished=_optional(it.get("finished_at"), _count),
            tokens=_optional(it.get("trained_tokens"), _count),
            file=_text(it.get("training_file")),
            settings={_text(name): str(value)[:40] for name, value in settings.items()} | {"seed": str(it.get("seed"))},
            error="" if error is None else _text(_object(error).get("message") or ""),
        )


@dataclass(frozen=True)
class Progress:
    """How far a job is, and what protected it so far."""

    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds_per_step: float | None = None
    requests: int | None = None
    verified: int | None = None
    mask_rows: int | None = None
    advantage: float | None = None
    budget: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far."""
        return None if self.seconds_per_step is None else max(0, self.steps - self.step) * self.seconds_per_step

    @property
    def tokens_per_second(self) -> float | None:
        """Of the steps so far, on the average."""
        if not self.seconds_per_step or not self.steps:
            return None
        return self.tokens / self.steps / self.seconds_per_step

    @classmethod
    def read(cls, document: Any) -> "Progress":
        """Raises IntegrityError: it is none."""
        it = _object(document).get("running")
        if it is None:
            return cls()
        it = _object(it)
        products, masks = _object(it.get("products") or {}), _object(it.get("masks") or {})
        return cls(
            _count(it.get("step")),
            _count(it.get("total_steps")),
            _count(it.get("tokens")),
            _optional(it.get("seconds_per_step"), _number),
            _optional(products.get("requests"), _count),
            _optional(products.get("verified"), _count),
            _optional(masks.get("rows"), _count),
            _optional(masks.get("advantage"), _number),
            _optional(masks.get("budget"), _number),
        )


@dataclass(frozen=True)
class Event:
    """Something that happened in a job."""

    id: str
    at: int
    level: str
    message: str
    step: int | None
    train_loss: float | None
    valid_loss: float | None

    @classmethod
    def read(cls, document: Any) -> "Event":
        """Raises IntegrityError: it is none."""
        it = _object(document)
        data = _object(it.get("data") or {})
        return cls(
            _identifier(it.get("id")),
            _count(it.get("created_at")),
            _one_of(it.get("level"), ("info", "warn", "error")),
            _text(it.get("message")),
            _optional(data.get("step"), _count),
            _optional(data.get("train_loss"), _number),
            _optional(data.get("full_valid_loss"), _number),
        )


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError(text("error.answer_object"))
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise IntegrityError(text("error.answer_list"))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise IntegrityError(text("error.answer_text"))
    return value[:_MOST_TEXT]


def _identifier(value: Any) -> str:
    """Part of a path of ours: letters, digits, dashes and underscores."""
    told = _text(value)
    if not told or len(told) > 128 or not told.replace("-", "").replace("_", "").isalnum() or not told.isascii():
        raise IntegrityError(text("error.answer_id"))
    return told


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise IntegrityError(text("error.answer_count"))
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e18:
        raise IntegrityError(text("error.answer_number"))
    return float(value)


def _one_of(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise IntegrityError(text("error.answer_one_of", choices=", ".join(choices)))
    return str(value)


def _optional(value: Any, read: Callable[[Any], T]) -> T | None:
    return None if value is None else read(value)
