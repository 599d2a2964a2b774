"""What the entries of `tune` share: error handling, messages and exit codes."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dskd.arguments import UsageError
from tune.storage.shown import shown

_OF_NO_USE = (
    "PYTHON worker processes have been started on node|There are infinite retries remaining|"
    "A worker died or was killed while executing a task"
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def run_entry(name: str, act: Callable[[], int], *, when_interrupted: str = "") -> NoReturn:
    """Call `act` and exit with the code that it returns.

    On bad input (ValueError, OSError) each line of the message is printed on stderr as an error of `name`, and the
    exit code is 2. Ctrl-C prints `when_interrupted` and exits with 130, SIGTERM likewise with 143. Any other error is a
    bug: its traceback is printed without addresses' credentials, and the exit code is 1. `act` also parses the command
    line.
    """
    keep_secrets_out_of_logs()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    # Read when ray is imported: lines of Ray on what the search itself deals with, and nobody else can.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _OF_NO_USE)
    try:
        sys.exit(act())
    except UsageError as error:  # its message names the program and --help already
        say(str(error))
        sys.exit(2)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            say(f"{name}: error: {line}")
        sys.exit(2)
    except KeyboardInterrupt as end:
        say(f"{name}: interrupted{when_interrupted and f'; {when_interrupted}'}")
        sys.exit(143 if isinstance(end, Terminated) else 130)
    except Exception:
        say(traceback.format_exc().rstrip())
        sys.exit(1)


def end_at_once(main: Callable[[], object]) -> NoReturn:
    """Call `main`, and end the process with its exit code, without the interpreter's own end.

    That takes three seconds once torch, Ray and MLflow are imported, and has nothing left to do: every command closes
    what it has opened before it exits.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_secrets_out_of_logs() -> None:
    """Let every log record of this process, of libraries too, show no credentials and no control characters."""
    make = logging.getLogRecordFactory()
    if getattr(make, "keeps_secrets", False):
        return

    def make_shown(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        # A formatter would put the arguments and the traceback in later.
        record.msg, record.args = shown(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = shown("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    make_shown.keeps_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_shown)


def say(line: str) -> None:
    """Print a line for the user on stderr, whatever is in it; stdout is for results."""
    print(shown(line), file=sys.stderr, flush=True)  # noqa: T201
