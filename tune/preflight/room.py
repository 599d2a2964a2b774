"""Whether a cluster has room for a trial; imports nothing slow, because a search asks while it still starts."""

from collections.abc import Sequence

from tune.runtime.cluster import Resources, cluster_nodes, connect, describe_shortage, resolve_gpus
from tune.settings.plan import SearchPlan
from tune.settings.workers import Workers


class PreflightError(ValueError):
    """Several errors, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))


def join_cluster(address: str | None, plan: SearchPlan | None) -> None:
    """Connect, and check that the cluster can hold a trial; raises the errors of `connect` and `check_cluster`."""
    connect(address)
    if plan is not None:
        check_cluster(plan, cluster_nodes())


def check_cluster(plan: SearchPlan, nodes: Sequence[Resources]) -> None:
    """Raise PreflightError if the nodes cannot hold a trial; one worker never spans two nodes.

    Not checked with --max-concurrent, which means that the cluster will grow when trials need it.
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
