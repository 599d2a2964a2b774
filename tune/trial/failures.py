"""Why a trial failed, in one line, and its retry cost, read from Ray's long error texts."""

import re

OUT_OF_MEMORY = "out of memory: "
"""First words of the reason if memory was too small."""
KILLED = "its process was killed (SIGKILL) or crashed, most likely because memory was too small"
_ADVICE = (
    "use nodes with more memory, fewer trials on each (--cpus-per-worker), or a smaller --batch-size or --image-size"
)
# Ray's memory monitor kills a process before the kernel does, and reports the memory in use.
_MONITOR = "due to the node running low on memory"
_SEEN = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was ([\d.]+)GB used / ([\d.]+)GB limit")
# The process ended without a message to its raylet; its node is still alive.
_VANISHED = "Worker unexpectedly exits with a connection error"
# The process was killed before it ran, on a node that is short of memory for one (seen with Ray 2.60).
_NEVER_RAN = "The actor never ran - it was cancelled before it started running"
# The process was lost with its node: Ray notices the broken connection first.
_LOST = re.compile(r"The actor [0-9a-f]+ is unavailable|its node has died|its owner has died")
# Errors of the other workers when one has died, often before Ray has noticed.
_PEER = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError|remote process exited")
# Header of each failure in Tune's error file of a trial.
_HEAD = re.compile(r"^Failure # \d+ \(occurred at [^)]*\)$", re.MULTILINE)

MAX_RETRY_COST = 99
"""A trial is restarted while the retry costs of its failures since its last new report sum to at most this."""


def retry_cost(text: str) -> int:
    """Retry cost of the trial's last failure: low for a lost node, which is common on a spot cluster.

    A trial survives 99 lost nodes in a row, 9 killed processes of its own or of another worker (by a person, a
    crash or too little memory: the text does not tell), or 3 failures of any other kind.
    """
    last = last_failure(text)
    if _MONITOR in last:
        return 33
    if _LOST.search(last):
        return 1
    return 11 if _VANISHED in last or _NEVER_RAN in last or _PEER.search(last) else 33


def last_line(text: str) -> str:
    """The last line of an error text, which has the exception's type and message."""
    return (text.strip().splitlines() or ["unknown error"])[-1]


def last_failure(text: str) -> str:
    """Tune's text on the last of a trial's failures."""
    return _HEAD.split(text)[-1].strip()


def out_of_memory_reason(text: str) -> str | None:
    """The reason if a trial's last failure was, or probably was, too little memory on its node; else None.

    If one of several DDP workers is killed, the others fail because it is gone: any of them may be reported last.
    """
    last = last_failure(text)
    if _MONITOR in last:
        seen = _SEEN.search(last)
        where = f"{seen[2]} of {seen[3]} GB in use on node {seen[1]}" if seen else "its node ran low on it"
        return f"{OUT_OF_MEMORY}{where}, and Ray's memory monitor ended the trial's process; {_ADVICE}"
    return f"{KILLED}; {_ADVICE}" if _VANISHED in last else None
