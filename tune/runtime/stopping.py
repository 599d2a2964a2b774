"""Ctrl-C and SIGTERM, told to a thread of their own, whatever the main thread waits for."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HANDLER_BYTES = 512
"""More than C's struct sigaction takes on any Linux."""
_KEEP_SECONDS = 0.01


def exit_code(number: int) -> int:
    """Exit code of a process that a signal ends: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def signals_told_to(stop: Callable[[signal.Signals], object]) -> Iterator[None]:
    """While the block runs, the first SIGINT or SIGTERM calls `stop` in a thread; the second ends the process at once.

    The main thread is not interrupted: it may wait in Ray, a thread pool or a database, which ends it late or never.
    Outside of the main thread nothing changes, as Python has no handlers there. An ignored SIGINT stays ignored, as
    that of a command in a shell's background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, tells = socket.socketpair()
    tells.setblocking(False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _noted)
    # Written to by Python's own C handler, while the main thread may not run any Python for long.
    earlier = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    listening = threading.Thread(target=_listen, args=(told, stop), name="signals", daemon=True)
    listening.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        tells.close()
        listening.join()
        told.close()


def _noted(number: int, frame: object) -> None:
    """Python's handler, which only has to exist."""


def _listen(told: socket.socket, stop: Callable[[signal.Signals], object]) -> None:
    is_stopping = False
    while byte := told.recv(1):
        if byte[0] not in SIGNALS:
            continue
        number = signal.Signals(byte[0])
        if is_stopping:
            os._exit(exit_code(number))
        is_stopping = True
        threading.Thread(target=stop, args=(number,), name="stop", daemon=True).start()


@contextmanager
def same_handlers() -> Iterator[None]:
    """The block changes no handler of SIGINT and SIGTERM: Ray's own prints a C++ trace on SIGTERM, and aborts.

    Ray installs it in the middle of its start, which takes seconds, so on Linux it is replaced as soon as it is there.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    has_ended = threading.Event()
    keeping = threading.Thread(target=_keep, args=(has_ended,), name="handlers", daemon=True)
    if sys.platform == "linux":
        keeping.start()
    try:
        yield
    finally:
        has_ended.set()
        if sys.platform == "linux":
            keeping.join()
        with suppress(ValueError):  # not the main thread
            for number, handler in before.items():
                signal.signal(number, handler)


def _keep(has_ended: threading.Event) -> None:
    """Install C's handlers of the signals, as they are now, again and again: Python does so in its main thread only."""
    libc = ctypes.CDLL(None)
    kept = {number: ctypes.create_string_buffer(_HANDLER_BYTES) for number in SIGNALS}
    for number, handler in kept.items():
        libc.sigaction(int(number), None, handler)
    while not has_ended.wait(_KEEP_SECONDS):
        for number, handler in kept.items():
            libc.sigaction(int(number), handler, None)
