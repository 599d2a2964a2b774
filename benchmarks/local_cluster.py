"""A Ray cluster of several nodes on this machine, whose processes can be found and killed.

Linux only: processes are found in /proc.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

TARGETS = {
    "worker": ("ray::RayTrainWorker", "ray::LoneWorker"),
    "controller": ("ray::TrainController",),
    "dispatcher": ("ray::DispatcherActor",),
    "relay": ("ray::ImplicitFunc",),
    "study": ("ray::search_category",),
    "queue": ("ray::_QueueActor",),
}
"""First words of a process's title: only workers compute; a controller exists only if trials have several of them."""
PATIENCE = 300.0
"""Maximum seconds to wait for anything to appear."""


class Process(NamedTuple):
    pid: int
    parent: int
    started: str
    """Start time in clock ticks since boot; with the pid it identifies a process uniquely."""
    title: str


def processes() -> dict[int, Process]:
    """Every running process of this machine, by its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended
            continue
        if state != "Z":
            found[int(folder.name)] = Process(int(folder.name), int(parent), rest[17], title)
    return found


def below(pid: int, among: dict[int, Process]) -> list[Process]:
    """The descendants of a process."""
    children = [each for each in among.values() if each.parent == pid]
    return [*children, *(each for child in children for each in below(child.pid, among))]


def titled(pid: int, title: str) -> list[Process]:
    """The descendants of a process whose title begins like this."""
    return [each for each in below(pid, processes()) if each.title.startswith(title)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to those of the processes that have not ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Cluster:
    """A token-protected Ray head without CPUs, and nodes that can be killed."""

    def __init__(self, folder: Path, env: dict[str, str], head_words: Sequence[str] = (), port: int = 0) -> None:
        """`head_words`: arguments of `ray start` for the head only; without a `port` a free one is used."""
        self.address = f"127.0.0.1:{port or free_port()}"
        dashboard_port = free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        # Ray Train's cleaner finds a cluster by this variable, and this machine may run several.
        self.env, self._folder = env | {"RAY_ADDRESS": self.address}, folder
        self._temporary: list[str] = []
        self.seen: set[Process] = set()
        """All processes seen here; one that outlives its node is a zombie."""
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count(1)
        self.head = self._start(
            "--head", f"--port={self.address.partition(':')[2]}", f"--dashboard-port={dashboard_port}", "--num-cpus=0",
            f"--ray-client-server-port={free_port()}", *head_words,
        )  # fmt: skip

    def add(self, cpus: int, *, prefix: Sequence[str] = (), env: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start a node; `prefix` is put before its command, `env` is added to its environment."""
        self.nodes.append(self._start(f"--address={self.address}", f"--num-cpus={cpus}", prefix=prefix, env=env))

    def _start(
        self, *words: str, prefix: Sequence[str] = (), env: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[bytes]:
        path = self._folder / f"node-{next(self._numbers)}.log"
        # A short path, since it also holds sockets, whose paths have at most 107 bytes. One folder per node, as on
        # separate machines: in a shared folder a node would remove the code of a job that other nodes run.
        temporary = tempfile.mkdtemp(prefix="ray-")
        self._temporary.append(temporary)
        ports = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*prefix, "ray", "start", "--block", "--disable-usage-stats", f"--temp-dir={temporary}",
                 *ports, *words],
                env=self.env | dict(env), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: "Ray runtime started" in path.read_text() or process.poll() is not None, "a node")
        if process.poll() is not None:
            raise RuntimeError(f"a node did not start: {path.read_text()[-2000:]}")
        return process

    def all(self) -> list[Process]:
        """Processes on the head and the nodes."""
        among = processes()
        mine = [each for node in (self.head, *self.nodes) for each in below(node.pid, among)]
        self.seen.update(mine)
        return mine

    def find(self, kind: str) -> list[Process]:
        """Processes of one kind on the head and the nodes."""
        return [each for each in self.all() if each.title.startswith(TARGETS[kind])]

    def raylets(self) -> set[int]:
        """Ids of all raylets below the head: its own and those of nodes that its autoscaler started."""
        found = [each for each in below(self.head.pid, processes()) if each.title.partition(" ")[0].endswith("/raylet")]
        self.seen.update(found)
        return {each.pid for each in found}

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node's raylet and its parent process with SIGKILL; its workers are left to notice it."""
        for each in processes().values():
            if each.parent == node.pid:
                os.kill(each.pid, signal.SIGKILL)
        self.nodes.remove(node)
        node.kill()
        node.wait()

    def announce(self, leaving: subprocess.Popen[bytes], seconds: int) -> None:
        """Announce to the cluster that a node will go in `seconds`, as a cloud does before it reclaims one."""
        words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed")
        titles = [each.title for each in below(leaving.pid, processes())]
        (node_id,) = (
            node["NodeID"]
            for node in census(self)["alive"]
            if any(f"--raylet_socket_name={node['RayletSocketName']} " in title for title in titles)
        )
        done = subprocess.run(
            ["ray", "drain-node", "--address", self.address, "--node-id", node_id, *words,
             "--deadline-remaining-seconds", str(seconds)],
            env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"ray drain-node refused: {done.stderr[-500:]}")

    def suspend(self, node: subprocess.Popen[bytes]) -> Callable[[], None]:
        """Stop all processes of a node, as of a machine that hangs; returns what lets them go on."""
        stopped = [node.pid, *(each.pid for each in below(node.pid, processes()))]
        signal_all(stopped, signal.SIGSTOP)
        return lambda: signal_all(stopped, signal.SIGCONT)

    def kill_head(self) -> None:
        """Kill the head, all its processes included, with SIGKILL; the nodes are left to notice it."""
        self.all()
        signal_all([self.head.pid, *(each.pid for each in below(self.head.pid, processes()))], signal.SIGKILL)
        self.head.wait()

    def node_of(self, process: Process) -> "subprocess.Popen[bytes] | None":
        among = processes()
        return next((node for node in self.nodes if process.pid in {each.pid for each in below(node.pid, among)}), None)

    def zombies(self) -> list[Process]:
        """Processes that still compute although no search runs, and remains of killed nodes."""
        computing = [each for kind in TARGETS for each in self.find(kind)]
        among = processes()
        here = {each.pid for node in (self.head, *self.nodes) for each in below(node.pid, among)}
        known = {(each.pid, each.started) for each in self.seen}
        left = [each for each in among.values() if (each.pid, each.started) in known and each.pid not in here]
        return computing + left

    def stop(self) -> None:
        self.all()  # processes that outlive their node are killed below
        for process in (*self.nodes, self.head):
            process.send_signal(signal.SIGTERM)
        for process in (*self.nodes, self.head):
            try:
                process.wait(5)  # a head that ran a search would take half a minute
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for each in self.seen:
            if (now := processes().get(each.pid)) and now.started == each.started:
                os.kill(each.pid, signal.SIGKILL)
        for number, temporary in enumerate(map(Path, self._temporary), 1):
            for logs in temporary.glob("session_2*/logs"):
                shutil.copytree(logs, self._folder / f"logs-{number}", symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)


def start_cluster(folder: Path, env: dict[str, str], nodes: int, cpus: int, port: int = 0) -> Cluster:
    """A head and `nodes` nodes of `cpus` CPUs each, once all have joined."""
    made = Cluster(folder, env, port=port)
    try:
        with ThreadPoolExecutor(max(1, nodes)) as pool:
            list(pool.map(made.add, [cpus] * nodes))
        wait_for(lambda: census(made)["nodes"] == nodes + 1, "the cluster")
    except BaseException:
        made.stop()
        raise
    return made


@contextmanager
def cluster(folder: Path, env: dict[str, str], nodes: int, cpus: int) -> Iterator[Cluster]:
    """`start_cluster` for as long as the block runs."""
    made = start_cluster(folder, env, nodes, cpus)
    try:
        yield made
    finally:
        made.stop()


_WHAT_IS_HELD = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False, logging_level="ERROR")
groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
alive = [actor.class_name for actor in list_actors(limit=10000, timeout=30) if actor.state != "DEAD"]
alive = [name for name in alive if name != "_AutoscalingCoordinatorActor"]  # Ray's own, one per cluster
nodes = [node for node in ray.nodes() if node["Alive"]]
have, free = ray.cluster_resources(), ray.available_resources()
held = {name: have[name] - free.get(name, 0) for name in ("CPU", "memory") if have.get(name, 0) != free.get(name, 0)}
print(json.dumps({"nodes": len(nodes), "alive": nodes, "held": held, "groups": len(groups), "actors": alive}))
"""


def census(made: Cluster) -> dict[str, Any]:
    """Nodes of the cluster, and resources, groups and actors in use; `nodes` is 0 if it does not answer yet."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _WHAT_IS_HELD],
            env=made.env, capture_output=True, text=True, check=False, timeout=90,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"nodes": 0, "held": {"?": 0}, "groups": -1, "actors": ["no answer"]}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"nodes"')]  # Ray prints lines too
    if not lines:
        return {"nodes": 0, "held": {"?": 0}, "groups": -1, "actors": [done.stderr[-300:]]}
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


def wait_for(ready: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until `ready` returns a true value, and return it; raises TimeoutError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear within {patience:.0f} s.")
        time.sleep(0.2)
    return found
