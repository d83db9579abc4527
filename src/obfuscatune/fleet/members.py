"""Who belongs to a fleet."""

from dataclasses import dataclass
from typing import Literal

Party = Literal["compute", "mask"]


@dataclass(frozen=True)
class Member:
    """A worker of a fleet, as a fleet's file or an operator's list names it."""

    address: str
    certificate: bytes | None
    """The worker's, PEM; None for one that takes no TLS."""
    operator: str
    party: Party
    memory: int | None = None
    """Bytes for matrices; None where that is not known."""
