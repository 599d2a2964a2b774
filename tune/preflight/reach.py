"""Whether every node reaches what a search reads and writes: proved on the node, by a token that the driver wrote.

A folder on this machine may be another one on a node, or none; keys and addresses of s3:// stand in each node's own
environment. Found before the first trial, not when one fails.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune.preflight.room import PreflightError
from tune.storage.files import Storage
from tune.storage.shown import shown
from tune.storage.uris import is_address

_NODE_SECONDS = 60.0
"""Seconds to wait for a node's answer; it starts a process for it."""
_OF_A_JOB = "working_dir_files"
"""Folder of Ray below which a submitted job's code lies, as long as the job runs."""


class Proof(NamedTuple):
    """What a node has to do."""

    home: str
    """Folder or address of the search."""
    token: str
    """Name of a folder there with the driver's token in it."""
    inputs: Sequence[tuple[str, str]]
    """Flags and the local paths that a node must have, too."""


def check_place(storage: str) -> None:
    """Raise ValueError if a local folder lies in the code of a submitted job, which goes with the job."""
    if not is_address(storage) and _OF_A_JOB in Path(storage).parts:
        raise ValueError(
            f"--storage {storage} lies in this job's temporary folder, which goes with the job; give the absolute path "
            "of a folder that all nodes share, or s3://BUCKET/PATH."
        )


def prove(proof: Proof, node: str) -> list[str]:
    """Read the driver's token and leave one of `node`; returns what this process cannot reach, a line each."""
    lines = [f"{flag} {path} does not exist" for flag, path in proof.inputs if not Path(path).exists()]
    other = f"--storage {proof.home} is not the folder that the driver writes to"
    if not is_address(proof.home) and not Path(proof.home, proof.token).is_dir():
        return [*lines, other]
    try:
        storage = Storage(proof.home)
        if storage.read_json(f"{proof.token}/driver.json") != {"token": proof.token}:
            return [*lines, other]
        storage.write_json(f"{proof.token}/{node}.json", {"token": proof.token})
    except OSError as error:
        lines.append(f"--storage {proof.home} cannot be used: {shown(str(error))}")
    return lines


Answers = Mapping[str, tuple[str, list[str] | str]]
"""Node's id to its address and the lines of `prove` there, or in one text why it does not answer."""


def on_every_node(proof: Proof) -> Answers:
    """The answers of all nodes that live now."""
    task = ray.remote(num_cpus=0, max_retries=3)(prove)  # by reference: no decorator
    nodes = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    running = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(proof, node)
        for node in nodes
    }
    ray.wait(list(running.values()), num_returns=len(running), timeout=_NODE_SECONDS)
    found: dict[str, tuple[str, list[str] | str]] = {}
    for node, result in running.items():
        try:
            found[node] = nodes[node], ray.get(result, timeout=0)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(result, force=True)
            found[node] = nodes[node], f"no answer within {_NODE_SECONDS:.0f} s"
        except ray.exceptions.RayError as error:
            found[node] = nodes[node], shown((str(error).strip().splitlines() or [type(error).__name__])[-1])
    return found


def check_reach(
    home: str,
    inputs: Mapping[str, str],
    ask: Callable[[Proof], Answers] = on_every_node,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Check that every node of the cluster uses the driver's storage, and has the local `inputs` (path by flag).

    Raises PreflightError with a line for each node that does not. One that does not answer, as it is full or about to
    go, proves nothing, which `say` tells; what trials find there is theirs to tell.
    """
    storage, token = Storage(home), f".reach-{secrets.token_hex(8)}"
    local = [(flag, path) for flag, path in inputs.items() if path and not is_address(path)]
    storage.write_json(f"{token}/driver.json", {"token": token})
    try:
        found = ask(Proof(home, token, local))
        answered = set(storage.names(token))
    finally:
        storage.remove(token)
    faults = []
    for node, (address, lines) in found.items():
        if isinstance(lines, str):
            say(f"node {address} could not be checked: {lines}")
            continue
        unseen = [] if lines or f"{node}.json" in answered else [f"what it writes to {home} does not arrive"]
        faults += [f"node {address}: {line}" for line in [*lines, *unseen]]
    if faults:
        faults[-1] += "; give folders that all nodes share, or s3:// addresses and keys in the nodes' environment."
        raise PreflightError(faults)
