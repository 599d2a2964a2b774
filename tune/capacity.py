"""What the nodes of a cluster hold: workers, each of them whole on one node, and the trials that they make up."""

from collections.abc import Mapping, Sequence

import ray

Resources = Mapping[str, float]


def cluster_nodes() -> list[Resources]:
    """Resources of every living node of the cluster that this process has joined."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_needs(cpus: float, gpus: float) -> dict[str, float]:
    """What a worker asks for, under Ray's names."""
    return {"CPU": cpus, "GPU": gpus}


def places(nodes: Sequence[Resources], needs: Resources) -> int:
    """Workers that the nodes hold."""
    asked = {name: need for name, need in needs.items() if need > 0}
    return sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in asked.items()) for node in nodes)


def trials_at_once(nodes: Sequence[Resources], needs: Resources, num_workers: int) -> int:
    """Trials of so many workers that the nodes hold, at least 1: a cluster may grow once something waits."""
    return max(1, places(nodes, needs) // num_workers)
