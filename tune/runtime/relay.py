"""A queue from the processes of a cluster to a function in the driver."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_END = "end"
"""The last item: all others have been handled before it."""


@contextmanager
def relayed(handle: Callable[[Any], object], on_loss: Callable[[str], object]) -> Iterator[Queue]:
    """A queue whose items a thread of this process passes to `handle`, one at a time.

    `on_loss` is called with the reason if the queue is gone, with its process or the whole cluster.

    When the block ends, all items put so far have been handled. The queue actor runs on this process's node; on
    another node its items would be lost if that node failed.
    """
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node()})

    def relay() -> None:
        while (item := take()) != _END:
            handle(item)

    def take() -> Any:
        try:
            return events.get()
        except ray.exceptions.RayError:
            on_loss("the process that collects the trials' events has died")
            return _END

    relaying = threading.Thread(target=relay, name="relay")
    relaying.start()
    try:
        yield events
    finally:
        with suppress(ray.exceptions.RayError):
            events.put(_END)
        relaying.join()


def this_node() -> NodeAffinitySchedulingStrategy:
    """Ray's scheduling strategy that keeps an actor on this process's node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
