"""Why a trial failed, in one line, and how much of its patience that costs, from the pages that Ray writes."""

import re

OUT_OF_MEMORY = "out of memory: "
"""What the reason begins with where memory did not suffice."""
KILLED = "its process was killed (SIGKILL) or crashed, most likely for want of memory"
_ADVICE = (
    "use nodes with more memory, fewer trials on each (--cpus-per-worker), or a smaller --batch-size or --image-size"
)
# Ray's memory monitor kills before the kernel would, and says what it saw.
_MONITOR = "due to the node running low on memory"
_SEEN = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was ([\d.]+)GB used / ([\d.]+)GB limit")
# A process that ended without a word to its raylet; its node lives on.
_VANISHED = "Worker unexpectedly exits with a connection error"
# Its node went, and it with it: Ray notices the broken connection first.
_LOST = re.compile(r"The actor [0-9a-f]+ is unavailable|its node has died|its owner has died")
# What the other workers meet where one has vanished, often before Ray knows that it has.
_PEER = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError|remote process exited")
# Tune heads every failure of a trial so, in one file.
_HEAD = re.compile(r"^Failure # \d+ \(occurred at [^)]*\)$", re.MULTILINE)

PATIENCE = 99
"""A trial starts again until its failures since its last new epoch have cost more than this."""


def cost(text: str) -> int:
    """What the last failure costs a trial: a lost node is no fault of its own, which a spot cluster has many of.

    So it outlives 99 lost nodes in a row, 9 killed processes of its own or of a worker's peer (by a person, a
    crash, or for want of memory: nobody can tell), or 3 failures of any other kind.
    """
    last = last_failure(text)
    if _MONITOR in last:
        return 33
    if _LOST.search(last):
        return 1
    return 11 if _VANISHED in last or _PEER.search(last) else 33


def last_failure(text: str) -> str:
    """What Tune wrote about the last of a trial's failures."""
    return _HEAD.split(text)[-1].strip()


def out_of_memory_reason(text: str) -> str | None:
    """The reason where a trial last failed because its node's memory did not suffice, or probably so; else None.

    Of several DDP workers one is killed, and the others fail because it is gone: any of them may come last.
    """
    last = last_failure(text)
    if _MONITOR in last:
        seen = _SEEN.search(last)
        where = f"{seen[2]} of {seen[3]} GB in use on node {seen[1]}" if seen else "its node ran low on it"
        return f"{OUT_OF_MEMORY}{where}, and Ray's memory monitor ended the trial's process; {_ADVICE}"
    return f"{KILLED}; {_ADVICE}" if _VANISHED in last else None
