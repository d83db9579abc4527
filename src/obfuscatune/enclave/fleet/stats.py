"""What went over all links of a fleet, and what befell its members."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from obfuscatune.enclave.client import ClientStats


@dataclass
class FleetStats(ClientStats):
    """Totals over all members since the fleet was opened."""

    workers: int = 0
    """Members that can be asked now."""
    hedged: int = 0
    """Requests that were sent to another replica too, because an answer took long."""
    moved: int = 0
    """Shards that were sent to another member than at first."""
    lost: int = 0
    """Times that a member died, hung or could not be reached."""
    returned: int = 0
    """Times that one came back."""
    left_slow: int = 0
    """Times that one was left for a while, because it was slow again and again."""
    left_wrong: int = 0
    """Members that were left for good, because they answered wrongly."""

    def count(self, links: Iterable[ClientStats]) -> None:
        """Sum what went over the links; `verified` is counted by those who verify."""
        links = list(links)
        for field in fields(ClientStats):
            if field.name not in ("verified", "crossings"):
                setattr(self, field.name, sum(getattr(link, field.name) for link in links))
