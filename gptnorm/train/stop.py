"""A wish to stop, heard between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


class StopWish:
    """Which signal asked the process to stop, if any.

    The first one is only noted, so that the loop can finish its step and write a checkpoint; a second Ctrl-C
    interrupts at once. Not under torchrun, whose processes get one Ctrl-C twice: from the terminal and from torchrun.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._impatient = "RANK" not in os.environ

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears SIGINT, SIGTERM and SIGHUP in here, those that are not ignored already (nohup does so).

        Signals reach the main thread alone, so elsewhere it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT and self._impatient:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
