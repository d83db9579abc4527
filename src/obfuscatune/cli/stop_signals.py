"""SIGTERM and SIGHUP: finish what must not be broken off, or end in good order at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_SIGNALLED = 128
"""Added to a signal's number, as shells report a process that it ended: 143 for SIGTERM."""


class Terminated(BaseException):
    """A signal asked this process to end; unwinds as Ctrl-C does, so that workers and links are closed."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = EXIT_SIGNALLED + signum


class StopSignals:
    """While the `with` lasts, SIGTERM and SIGHUP raise `Terminated`, or are waited for where `patient` is set.

    A signal that is ignored (`nohup`) stays so. Outside the main thread, where Python takes no handlers, this does
    nothing.
    """

    def __init__(self) -> None:
        self.patient = False
        """Whether somebody asks `received` often enough, and wants no exception for the first signal."""
        self.received: int | None = None
        """The number of the signal that came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def asked(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        first, self.received = self.received is None, signum
        if not (first and self.patient):
            raise Terminated(signum)
