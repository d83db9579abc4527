"""The members of a fleet: who can be asked, who is left and why, and what becomes of what they had to do.

    joining  ->  active  ->  away: it failed, hung, or was slow again and again; joined again after a pause
                         ->  out: it answered wrongly; for good

Members tell of themselves in their own threads. All that changes here changes under one lock.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable

from torch import Tensor

from obfuscatune.enclave.client import WorkerLink
from obfuscatune.enclave.fleet.asking import Asking
from obfuscatune.enclave.fleet.holdings import Holdings
from obfuscatune.enclave.fleet.jobs import Job, Join, Part, Upload, now
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.enclave.fleet.request import FleetProduct
from obfuscatune.enclave.fleet.stats import FleetStats
from obfuscatune.errors import BadReply, ConnectionLost, WrongProduct
from obfuscatune.fleet.members import Member
from obfuscatune.fleet.placement import Plan
from obfuscatune.fleet.policy import key_of

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 2.0
"""Seconds before a member that failed is tried again; doubled each time that it cannot be reached."""
STEADY_SECONDS, LONGEST_UNSTEADY_PAUSE = 5.0, 30.0
"""Who fails sooner after it joined is let alone for twice as long as before: it was sent its shards for nothing."""
SLOW_PAUSE = 30.0
"""Seconds before a member that was slow is tried again."""
WRONG_AT_MOST = 3
"""Members of one operator that may answer wrongly before no other of its members is taken in."""

Notice = Callable[[str], None]


class Roster:
    """See the module."""

    def __init__(
        self, connect: Callable[[Member], WorkerLink], plan: Plan, notice: Notice, *, hedge: bool, patience_s: float
    ) -> None:
        """See `FleetClient`."""
        self._notice, self._connect = notice, connect
        self.links: dict[str, MemberLink] = {}
        """By address."""
        self._wrong: Counter[str] = Counter()
        """Members that answered wrongly, by key and by operator."""
        self.holdings = Holdings(self.links, plan, self.notice)
        self.asking = Asking(self.holdings, hedges=hedge, patience_s=patience_s, too_late=self._too_late)
        self.stats = FleetStats()
        self.products: weakref.WeakSet[FleetProduct] = weakref.WeakSet()
        """That are asked for, and somebody waits for or may."""
        self.verdict = ""
        """Why nothing may be asked any more."""
        self.failure: BaseException | None = None
        """What ended a member's thread: a failure of our own, after which parts might be waited for in vain."""
        self.closed = False
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """In a forked child: threads, and what was asked, are the parent's."""
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        for product in self.products:
            product.error = ConnectionLost("the process that this one was forked from asked for this: ask again")
            product.arrived = threading.Event()
        for link in self.links.values():
            link.begin_in_child()

    def add(self, member: Member) -> None:
        """Take in a member, unless it, or too many others of its operator, answered wrongly."""
        with self.lock:
            is_wrong = self._wrong[key_of(member) or member.address] or self._wrong[member.operator] >= WRONG_AT_MOST
            is_here = member.address in self.links or any(
                it.key is not None and it.key == key_of(member) for it in self.links.values()
            )
            if self.closed or is_wrong or is_here:
                return
            connect = self._connect
            link = MemberLink(member, lambda: connect(member), weakref.ref(self))
            self.links[member.address] = link
            link.put(Join())

    def remove(self, address: str) -> None:
        """Leave a member that is listed no more; what it held goes to others."""
        with self.lock:
            link = self.links.get(address)
            if link is not None and link.state is not State.OUT:
                link.state = State.OUT
                self._empty(link)
                del self.links[address]

    def update(self, listed: Iterable[Member], fixed: Container[str]) -> None:
        """Take in those that are listed now, and leave those that are not; but none of those at `fixed` addresses."""
        members = {member.address: member for member in listed}
        for link in self.present:
            if link.name not in fixed and members.get(link.name) != link.member:
                self.remove(link.name)
        for member in members.values():
            self.add(member)

    @property
    def present(self) -> list[MemberLink]:
        """Of all members, those away among them."""
        with self.lock:
            return list(self.links.values())

    def notice(self, line: str) -> None:
        """Say what befell a member. Where nobody can be told, as after the end of a pipe, the work goes on."""
        try:
            self._notice(line)
        except OSError as error:
            log.warning("%s (%s)", line, error)

    def wake(self) -> None:
        for product in list(self.products):
            product.arrived.set()
        self.changed.notify_all()

    # What members tell, in their threads; see `link.Fleet`.

    def joined(self, link: MemberLink) -> None:
        """It is connected, and its speed is known."""
        with self.changed:
            if self.closed or link.state is State.OUT:
                return
            if link.state is State.AWAY:
                self.stats.returned += link.was_active
                self.notice(f"{link.title} is {'back' if link.was_active else 'there'}")
            link.state, link.was_active = State.ACTIVE, True
            link.active_since, link.reason = now(), ""
            link.timing.forgiven()
            self._ask_all(self.holdings.rearranged(joining=[link.name]))
            self.changed.notify_all()

    def answered(self, link: MemberLink, part: Part, product: Tensor, seconds: float) -> None:
        """A product came, which is finite. That of a member that was wrong before is dropped."""
        with self.lock:
            if link.state is State.OUT:
                self.asking.ask_another(part, link, WrongProduct(link.reason))
                return
            self.asking.answered(link, part, seconds)
            if part.answer is None:
                part.answer, part.answered_by = product, link
                if not part.request.undone:
                    self.stats.crossings += 1
                part.request.arrived.set()

    def refused(self, link: MemberLink, part: Part, error: Exception) -> None:
        """It answered with an error, and can be asked other things."""
        with self.lock:
            part.refused_by.add(link)
            self.asking.ask_another(part, link, error)

    def uploaded(self, link: MemberLink, upload: Upload) -> None:
        """An upload is done, well or not."""
        with self.changed:
            self._ask_all(self.holdings.held(link, upload))
            upload.done.set()
            self.changed.notify_all()

    def failed(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """It cannot be asked anything now."""
        with self.changed:
            if link.state is not State.OUT and not self.closed:
                if isinstance(error, BadReply | WrongProduct):
                    self.expel(link, str(error))
                elif link.state is not State.AWAY or link.retry_at == float("inf"):
                    self._leave(link, link.reason or str(error), FIRST_PAUSE)
            self._undone(link, error, jobs)
            self.changed.notify_all()

    def try_again(self, link: MemberLink) -> None:
        """Join a member that is away."""
        with self.lock:
            link.retry_at = float("inf")
            forget, link.to_forget = link.to_forget, []
            link.put(Join(forget))

    def broke(self, error: BaseException) -> None:
        """A member's thread ends, by a failure of our own: whoever waits is told."""
        with self.changed:
            self.failure = error
            self.wake()

    # Under the lock, all of the following.

    def _undone(self, link: MemberLink, error: Exception, jobs: list[Job]) -> None:
        """Have done otherwise what a member did not do."""
        for job in jobs:
            if isinstance(job, Part):
                self.asking.ask_another(job, link, error)
            elif isinstance(job, Upload):
                job.error = job.error or error
                job.done.set()
            elif isinstance(job, Join):
                link.to_forget += job.forget

    def _ask_all(self, parts: list[Part]) -> None:
        for part in parts:
            self.asking.ask(part)
            part.request.arrived.set()

    def _leave(self, link: MemberLink, reason: str, first_pause: float) -> None:
        """Leave a member for now."""
        was = link.state
        if was is State.ACTIVE and now() - link.active_since >= STEADY_SECONDS:
            link.pause = 0.0
        longest = LONGEST_UNSTEADY_PAUSE if was is State.ACTIVE else LONGEST_PAUSE
        link.pause = min(max(longest, first_pause), max(first_pause, 2 * link.pause))
        link.state, link.retry_at, link.reason = State.AWAY, now() + link.pause, reason
        if was is State.ACTIVE:
            self.notice(f"{link.title} is left for a while: {reason}")
            self._ask_all(self.holdings.without(link))
        elif was is State.JOINING:
            self.notice(f"{link.title} cannot be used: {reason}")
        if was is State.ACTIVE and first_pause == FIRST_PAUSE:
            self.stats.lost += 1

    def _too_late(self, link: MemberLink) -> None:
        self.stats.left_slow += 1
        self._leave(link, "it is slow again and again", SLOW_PAUSE)
        self._empty(link)

    def expel(self, link: MemberLink, reason: str) -> None:
        """Leave a member for good, with all that it answered and nobody has used yet. The last one's error is ours."""
        if link.state is State.OUT:
            return
        link.state, link.reason = State.OUT, reason
        self.stats.left_wrong += 1
        self._wrong.update({link.key or link.name, link.member.operator})
        self.notice(f"{link.title} answered wrongly and is asked nothing any more: {reason}")
        for product in list(self.products):
            for part in product.doubtful(link):
                self.asking.ask(part)
        self._empty(link)
        link.close()
        if all(other.state is State.OUT for other in self.links.values()):
            self.verdict = (
                f"{link.title} answered wrongly: {reason}. No worker of the fleet is asked anything any more: find out "
                "why, then load or protect the model anew, which draws new secrets"
            )
            self.wake()

    def _empty(self, link: MemberLink) -> None:
        """Have others do what a member has not done, and hold what it holds."""
        jobs = link.take_jobs()
        self._ask_all(self.holdings.without(link))
        self._undone(link, ConnectionLost(f"{link.title} is left"), jobs)
        link.interrupt()
