"""Whom to ask for a part of a product, when to ask another, and who is late too often.

Everything here is called under the fleet's lock, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from obfuscatune.enclave.fleet.holdings import Holdings
from obfuscatune.enclave.fleet.jobs import Part, now
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.enclave.fleet.request import FleetProduct
from obfuscatune.enclave.fleet.timing import hedge_after
from obfuscatune.errors import ConnectionLost, WireError

HEDGE_LEAST, HEDGE_MOST = 0.03, 1.0
"""Seconds after which a request is sent to another replica: at least, and at most unless it takes long by its size."""
LATE = 2.0
"""Times that after which a request is sent to another replica: an answer that took so long counts against a member."""
WAIT_SECONDS = 0.5
"""Longest wait before a product that is awaited is looked at again."""


class Asking:
    """Chooses holders for parts."""

    def __init__(
        self, holdings: Holdings, *, hedges: bool, patience_s: float, too_late: Callable[[MemberLink], None]
    ) -> None:
        """
        Args:
            holdings: who has what.
            hedges: whether a late part is asked of another holder too.
            patience_s: how long a part waits for a holder.
            too_late: is told of a member that is late again and again.
        """
        self.hedged = 0
        self._holdings, self._hedges, self._patience_s, self._too_late = holdings, hedges, patience_s, too_late

    def ask(self, part: Part) -> None:
        """Ask the holder that should answer first; where there is none, wait for one."""
        if part.answer is not None or part.asked:
            return
        if part.shard.replaced_by:
            for piece in part.request.split(part):
                self.ask(piece)
        elif (link := self._best(part)) is not None:
            self._send(part, link)
        else:
            part.due = now() + self._patience_s
            part.shard.waiting.append(part)

    def ask_another(self, part: Part, link: MemberLink, error: Exception) -> None:
        """A member failed a part: ask another, unless one is asked already, or all that there are have refused.

        What is no error of the wire is the enclave's own, and met again by whoever is asked.
        """
        if link in part.asked:
            part.asked.remove(link)
        if part.answer is not None or part.asked:
            return
        all_refused = bool(part.refused_by) and set(part.shard.holders) <= part.refused_by
        if all_refused or not isinstance(error, WireError):
            part.request.error = error
        else:
            self.ask(part)
        part.request.arrived.set()  # it may be asked in other parts now, whose time is another

    def hedge(self, product: FleetProduct) -> float:
        """Ask others too for the parts that are late; seconds until the next part is.

        A part that nobody could be asked for, for too long, is the product's error.
        """
        time, wait = now(), WAIT_SECONDS
        for part in product.undone:
            if time < part.due:
                wait = min(wait, part.due - time)
            elif not part.asked:
                product.error = ConnectionLost(
                    f"no worker of the fleet holds a matrix that is needed; gave up after {self._patience_s:g} s: "
                    "start the workers (again), then resume"
                )
            elif self._hedges and (link := self._best(part)) is not None:
                self.hedged += 1
                self._send(part, link)
            else:
                part.due = time + HEDGE_MOST
        return wait

    def answered(self, link: MemberLink, part: Part, seconds: float) -> None:
        """Count how long a member took."""
        link.timing.was_late(seconds > LATE * self._patience_with(link, part))
        link.timing.took(part.kind, seconds)
        if link in part.asked:
            part.asked.remove(link)
        if link.timing.is_late_often and link.state is State.ACTIVE and len(self._holdings.active) > 1:
            self._too_late(link)

    def _send(self, part: Part, link: MemberLink) -> None:
        expected = link.timing.expected(part.kind, part.work)
        part.due = now() + min(HEDGE_MOST, link.load) + self._patience_with(link, part)
        part.asked.append(link)
        link.put(part, expected)

    def _patience_with(self, link: MemberLink, part: Part) -> float:
        """Seconds after which an answer is late, once it is the member's turn to compute it."""
        active = self._holdings.active
        p99s = [it for it in (other.timing.p99(part.kind) for other in active) if it is not None]
        speeds = sorted(other.timing.speed for other in active)
        expected = link.timing.expected(part.kind, part.work)
        slowness = speeds[len(speeds) // 2] / link.timing.speed
        return hedge_after(p99s, slowness, expected, least=HEDGE_LEAST, most=HEDGE_MOST)

    def _best(self, part: Part) -> MemberLink | None:
        """The holder that should answer first, of those that are not asked yet."""
        time = now()

        def seconds(link: MemberLink) -> tuple[float, str]:
            expected = link.timing.expected(part.kind, part.work)
            since = link.busy_since
            silent = 0.0 if since is None else max(0.0, time - since - 2 * expected)
            return link.load + expected + silent, link.name

        return min(
            (
                link
                for link in part.shard.holders
                if link.state is State.ACTIVE and link not in part.asked and link not in part.refused_by
            ),
            key=seconds,
            default=None,
        )
