"""A queue between the processes of a cluster and a function of the driver."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@contextmanager
def relayed(handle: Callable[[Any], object]) -> Iterator[Queue]:
    """A queue whose items a thread of this process hands to `handle`, one after the other.

    When the block ends, all items put until then have been handled. The queue lives on this process's node: items
    on their way would be lost with another one.
    """
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})
    is_done = threading.Event()

    def relay() -> None:
        while True:
            try:
                item = events.get(timeout=1)
            except Empty:
                if is_done.is_set():
                    return
                continue
            handle(item)

    relaying = threading.Thread(target=relay, name="relay")
    relaying.start()
    try:
        yield events
    finally:
        is_done.set()
        relaying.join()


def this_node() -> NodeAffinitySchedulingStrategy:
    """Ray's scheduling strategy that keeps an actor on this process's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
