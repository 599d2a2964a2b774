"""Whether a cluster has room for a trial; imports nothing slow, because a search asks while it still starts."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tune.runtime.cluster import Resources, cluster_nodes, connect, describe_shortage, resolve_gpus
from tune.runtime.ray_internals import autoscaler_can_help
from tune.settings.plan import SearchPlan
from tune.settings.workers import Workers


class PreflightError(ValueError):
    """Several errors, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))


_SAY_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_ADVICE = (
    "lower --workers-per-trial, --cpus-per-worker or --gpus-per-worker, or give a cluster that grows more time by "
    "--wait-for-resources"
)


class Cluster(NamedTuple):
    """What is asked of a cluster while something waits for its nodes."""

    nodes: Callable[[], Sequence[Resources]] = cluster_nodes
    can_help: Callable[[], bool | None] = autoscaler_can_help
    """Whether more nodes will come for what waits; None if nobody knows."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def wait_for_room(
    workers: Workers, seconds: float, say: Callable[[str], object], cluster: Cluster | None = None
) -> None:
    """Wait until the nodes can hold `workers` together; says at once, and every 30 s, what is asked and what there is.

    It waits as long as Ray's autoscaler brings nodes; where that says that no node will meet the demand, or says
    nothing, for `seconds` in which no node came either. Raises PreflightError then.
    """
    cluster = cluster or Cluster()
    began = hopeful = cluster.clock()
    said, known = -math.inf, -1
    while lines := describe_shortage(nodes := cluster.nodes(), workers):
        now, can_help = cluster.clock(), cluster.can_help()
        if can_help or len(nodes) > known:
            hopeful, known = now, max(known, len(nodes))
        if now - hopeful >= seconds:
            raise PreflightError([f"{line}, and no node came within {seconds:.0f} s; {_ADVICE}." for line in lines])
        if now - said >= _SAY_SECONDS:
            growth = {
                True: "the autoscaler brings nodes",
                False: "the autoscaler's limits do not allow it",
                None: "no autoscaler says that nodes come",
            }[can_help]
            left = "" if can_help else f", which ends in {seconds - (now - hopeful):.0f} s"
            for line in lines:
                say(f"{line}: waiting for the cluster to grow{left}; {growth}")
            said = now
        cluster.sleep(_LOOK_SECONDS)
    if said > -math.inf:
        say(f"the cluster has room now, after {cluster.clock() - began:.0f} s")


def join_cluster(address: str | None, plan: SearchPlan | None) -> None:
    """Connect, and check that the cluster can hold a trial; raises the errors of `connect` and `check_cluster`."""
    connect(address)
    if plan is not None:
        check_cluster(plan, cluster_nodes())


def check_cluster(plan: SearchPlan, nodes: Sequence[Resources]) -> None:
    """Raise PreflightError if the nodes cannot hold a trial; one worker never spans two nodes.

    For a cluster that cannot grow, and for a dry run. Not checked with --max-concurrent, which means that the cluster
    will grow when trials need it.
    """
    if plan.max_concurrent is not None:
        return
    workers = Workers(
        plan.min_workers or plan.num_workers, plan.cpus_per_worker, resolve_gpus(plan.gpus_per_worker, nodes)
    )
    if shortage := describe_shortage(nodes, workers):
        raise PreflightError(
            [
                f"{line}; lower --workers-per-trial, --cpus-per-worker or --gpus-per-worker, or give --max-concurrent "
                "where the cluster grows by itself."
                for line in shortage
            ]
        )
