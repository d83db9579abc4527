"""What was checked, one line each: the checks that a verification makes, in order."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

MOST_CHARACTERS = 400
"""Of what was expected or found. Both may come from the attester: they are cut and escaped before they are shown."""
ANY = ("any",)
"""A set of measurements that holds every value."""


@dataclass(frozen=True)
class Check:
    """One thing that had to hold."""

    name: str
    """Of the part and field: `tdx.mr_td`."""
    passed: bool
    expected: str
    found: str

    def __str__(self) -> str:
        """One line, as `obfuscatune verify` prints it."""
        if self.passed:
            return f"holds  {self.name}: {self.found}"
        return f"FAILS  {self.name}: expected {self.expected}, found {self.found}"

    def to_document(self) -> dict[str, object]:
        """The check within a verification document."""
        return {"name": self.name, "passed": self.passed, "expected": self.expected, "found": self.found}


class Checks:
    """Collects checks. None of its methods raises, so that all that fails is seen at once."""

    def __init__(self, prefix: str = "", collected: "list[Check] | None" = None) -> None:
        self._prefix = prefix
        self._collected = [] if collected is None else collected

    def under(self, prefix: str) -> "Checks":
        """The same list, for names that begin with `prefix`."""
        return Checks(f"{self._prefix}{prefix}.", self._collected)

    def that(self, name: str, passed: bool, *, expected: object, found: object) -> bool:
        """Add a check and return whether it passed."""
        self._collected.append(Check(self._prefix + name, passed, shown(expected), shown(found)))
        return passed

    def signed(self, genuine: bool, by: str) -> bool:
        """Add the check that a signature is valid."""
        return self.that("signature", genuine, expected=f"by {by}", found="valid" if genuine else "invalid")

    def equal(self, name: str, found: object, expected: object) -> bool:
        """Add the check that two values of one type are equal."""
        return self.that(name, type(found) is type(expected) and found == expected, expected=expected, found=found)

    def one_of(self, name: str, found: str, allowed: Collection[str]) -> bool:
        """Add the check that a value is in a set."""
        return self.that(name, found in allowed, expected=_alternatives(allowed), found=found)

    def measured(self, name: str, found: bytes, allowed: tuple[str, ...]) -> bool:
        """Add the check that a measurement is in a set of them in hex, which may be `ANY`."""
        passed = allowed == ANY or found.hex() in allowed
        return self.that(name, passed, expected=_alternatives(allowed), found=found)

    def within(self, name: str, now: int, begin: float, end: float) -> bool:
        """Add the check that a time lies between two others, both included."""
        expected = f"{readable_time(begin)} to {readable_time(end)}"
        return self.that(name, begin <= now <= end, expected=expected, found=readable_time(now))

    def at_least(self, name: str, found: int, minimum: int) -> bool:
        """Add the check that a number is not below a minimum."""
        return self.that(name, found >= minimum, expected=f"at least {minimum}", found=found)

    @property
    def all(self) -> tuple[Check, ...]:
        """Every check so far."""
        return tuple(self._collected)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Those that did not pass."""
        return tuple(check for check in self._collected if not check.passed)


def readable_time(seconds: float) -> str:
    """Unix seconds as people write a time."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return f"second {seconds}"


def _alternatives(allowed: Collection[str]) -> str:
    shown = sorted(allowed)
    return " or ".join(shown) if shown else "nothing: the policy allows none"


def shown(value: object) -> str:
    """Text in printable ASCII of bounded length."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    cut = text[:MOST_CHARACTERS] + ("..." if len(text) > MOST_CHARACTERS else "")
    escaped = cut.encode("unicode_escape").decode("ascii")
    return escaped or "nothing"
