"""Reasons of failed trials: texts are as Ray 2.60 writes them, shortened where "…" stands."""

import pytest

from tune.trial.failures import MAX_RETRY_COST, out_of_memory_reason, retry_cost

MONITOR = """\
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 8bf27c4d) was \
12.04GB used / 23.54GB limit (0.511370)
OOM kill reason: Memory usage 13410930688B exceeded threshold of 252765008B (1.0% of 25276502016B limit)
…
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/…"""
KILLED = """\
The actor died unexpectedly before finishing this task.
	class_name: ImplicitFunc
	pid: 601
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) …"""
NODE_LOST = """\
The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 8bf27c4d
	the actor's node was terminated unexpectedly: …"""
UNREACHABLE = """\
The actor 46982d320563f740f530cd0604000000 is unavailable: The actor is temporarily unavailable: RpcError: RPC error: \
Socket closed rpc_code: 14. The task may or may not have been executed on the actor."""
OF_WORKERS = """\
ray::ImplicitFunc.train() (pid=7063, ip=10.0.0.7, actor_id=8be5821e, repr=run_trial_ac31c284)
…
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 0 Error Snippet]:
{}
[Rank 1 Error Snippet]:
RuntimeError: Connection closed by peer [10.0.0.8]:4711"""


def failures(*texts: str) -> str:
    return "".join(f"Failure # {n} (occurred at 2026-11-21_18-37-42)\n{text}\n" for n, text in enumerate(texts, 1))


@pytest.mark.parametrize("form", ["{}", OF_WORKERS])
def test_what_rays_memory_monitor_killed_says_how_full_which_node_was_and_what_to_do(form: str) -> None:
    reason = out_of_memory_reason(failures(KILLED, form.format(MONITOR)))
    assert reason is not None and reason.startswith("out of memory: 12.04 of 23.54 GB in use on node 10.0.0.7")
    assert "--batch-size" in reason and "\n" not in reason and "https" not in reason


@pytest.mark.parametrize("form", ["{}", OF_WORKERS])
def test_what_something_else_killed_was_probably_short_of_memory(form: str) -> None:
    reason = out_of_memory_reason(failures(MONITOR, form.format(KILLED)))
    assert reason is not None and reason.startswith("its process was killed (SIGKILL)")
    assert "--batch-size" in reason and "\n" not in reason


@pytest.mark.parametrize("last", [NODE_LOST, OF_WORKERS.format("ValueError: no image"), "unknown error"])
def test_other_failures_are_not_laid_to_memory_whatever_came_before(last: str) -> None:
    assert out_of_memory_reason(failures(MONITOR, KILLED, last)) is None


@pytest.mark.parametrize(
    ("text", "survived"),
    [
        (NODE_LOST, 99),
        (UNREACHABLE, 99),
        (OF_WORKERS.format(NODE_LOST), 99),
        (KILLED, 9),
        (OF_WORKERS.format("RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.7]:4710"), 9),
        (OF_WORKERS.format(KILLED), 9),
        ("The actor died: The actor never ran - it was cancelled before it started running.", 9),
        (MONITOR, 3),
        (OF_WORKERS.format(MONITOR) + UNREACHABLE, 3),
        ("RuntimeError: cuDNN error", 3),
    ],
)
def test_a_trial_outlives_more_losses_of_nodes_than_failures_of_its_own(text: str, survived: int) -> None:
    assert retry_cost(failures("RuntimeError: cuDNN error", text)) == retry_cost(failures(text)), "only the last counts"
    counted = restarts = 0
    while (counted := counted + 1) <= MAX_RETRY_COST:  # Tune counts 1, decides, then calls on_trial_error
        counted += retry_cost(text) - 1
        restarts += 1
    assert restarts == survived
