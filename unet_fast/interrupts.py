"""Signals that ask a training to stop."""

import contextlib
import signal
import threading


class Interrupted(KeyboardInterrupt):
    """Training was told to stop by a signal, and did so after the steps under way; `signum` is the signal."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def signals():
    """Collects the first SIGINT or SIGTERM in the list that it yields; the next one does what it would without this.

    >>> from unet_fast.interrupts import signals
    >>> with signals() as caught:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> caught == [signal.SIGTERM]
    True
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may, and does, handle signals
        return

    def handle(signum, frame):
        caught.append(signum)
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()
