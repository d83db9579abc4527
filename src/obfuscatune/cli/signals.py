"""Signals that ask a command to end: it unwinds as by Ctrl-C, or finishes first what must not be broken off."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_SIGNALLED = 128
"""Added to a signal's number, as shells report a process that it ended: 143 for SIGTERM."""


class Terminated(BaseException):
    """A signal asked this process to end; unwinds as Ctrl-C does, so that workers and links are closed."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = EXIT_SIGNALLED + signum


class StopSignals:
    """SIGTERM and SIGHUP, as `stop_signals` takes them: they raise `Terminated`, or are waited for."""

    def __init__(self) -> None:
        self.patient = False
        """Whether somebody asks `received` often enough, and wants no exception for the first signal."""
        self.received: int | None = None
        """The number of the signal that came."""

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        """A signal came.

        Raises:
            Terminated: nobody is patient, or it is the second one.
        """
        first, self.received = self.received is None, signum
        if not (first and self.patient):
            raise Terminated(signum)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """While the `with` lasts, SIGTERM and SIGHUP raise `Terminated`, or are waited for where `patient` is set."""
    signals = StopSignals()
    with _handled(signals.handle, signal.SIGTERM, signal.SIGHUP):
        yield signals


@contextmanager
def until_told() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGHUP and Ctrl-C set while the `with` lasts."""
    over = threading.Event()
    with _handled(lambda *_: over.set(), signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        yield over


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], *signals: signal.Signals) -> Iterator[None]:
    """Install a handler while the `with` lasts.

    A signal that is ignored (`nohup`) stays so. Outside the main thread, where Python takes no handlers, all do.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [it for it in signals if signal.getsignal(it) is not signal.SIG_IGN]
        before = {it: signal.signal(it, handler) for it in wanted}
    try:
        yield
    finally:
        for signum, handler_before in before.items():
            signal.signal(signum, handler_before)
