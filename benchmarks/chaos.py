"""Compares a search whose processes are killed at random moments with the same search left undisturbed.

`python benchmarks/chaos.py` starts a Ray head and three nodes on this machine. It runs one search undisturbed, and one
while it kills processes and whole nodes with SIGKILL and replaces them as a cluster manager would. At the end it
pulls the champion. With `--submit` both searches are jobs (`ray job submit`). The servers are SQLite and a folder, or
those of the environment (`python tests/services.py DIR &  . DIR/env`). The seed determines the schedule of kills.
Linux only: it finds its processes in /proc.
"""

import itertools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
import tyro
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from dskd.demo.dataset import draw_dataset
from dskd.detector import Detector
from tune.storage.files import Storage
from tune.trial.checkpoints import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "worker": ("ray::RayTrainWorker", "ray::LoneWorker"),
    "controller": ("ray::TrainController",),
    "dispatcher": ("ray::DispatcherActor",),
    "relay": ("ray::ImplicitFunc",),
    "study": ("ray::search_category",),
}
"""First words of a process's title: only workers compute; a controller exists only if trials have several of them."""
KINDS = ("worker", "node", "driver", "relay", "study", "worker's node", "controller", "dispatcher")
_PATIENCE = 300.0
"""Maximum seconds to wait for anything to appear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Kill processes of a search and count its losses."""

    kills: int = 21
    seed: int = 0
    """Seed of the schedule of kills."""
    trials: int = 4
    epochs: int = 160
    """Epochs of a trial; enough that the search does not end before the last kill."""
    workers_per_trial: int = 2
    max_concurrent: int = 1
    """Trials at once; with several, pruning depends on their speed, and so may the champion."""
    nodes: int = 3
    cpus_per_node: int = 1
    image_size: int = 32
    data: Path | None = None
    """Folder of categories, of which the first is searched; drawn by default."""
    preset: str = "stfpm"
    longest_pause: float = 8.0
    """Maximum seconds between a target's appearance and its kill."""
    submit: bool = False
    """Run the search as a job on the head, with uploaded code, not as a child process."""
    folder: Path | None = None
    """Folder for logs and results; a temporary one by default."""


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        self._head = self._start(
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
        mine = [each for node in (self._head, *self.nodes) for each in below(node.pid, among)]
        self.seen.update(mine)
        return mine

    def find(self, kind: str) -> list[Process]:
        """Processes of one kind on the head and the nodes."""
        return [each for each in self.all() if each.title.startswith(TARGETS[kind])]

    def raylets(self) -> set[int]:
        """Ids of all raylets below the head: its own and those of nodes that its autoscaler started."""
        found = [
            each for each in below(self._head.pid, processes()) if each.title.partition(" ")[0].endswith("/raylet")
        ]
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

    def node_of(self, process: Process) -> "subprocess.Popen[bytes] | None":
        among = processes()
        return next((node for node in self.nodes if process.pid in {each.pid for each in below(node.pid, among)}), None)

    def zombies(self) -> list[Process]:
        """Processes that still compute although no search runs, and remains of killed nodes."""
        computing = [each for kind in TARGETS for each in self.find(kind)]
        among = processes()
        here = {each.pid for node in (self._head, *self.nodes) for each in below(node.pid, among)}
        known = {(each.pid, each.started) for each in self.seen}
        left = [each for each in among.values() if (each.pid, each.started) in known and each.pid not in here]
        return computing + left

    def stop(self) -> None:
        self.all()  # processes that outlive their node are killed below
        for process in (*self.nodes, self._head):
            process.send_signal(signal.SIGTERM)
        for process in (*self.nodes, self._head):
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


@contextmanager
def cluster(folder: Path, env: dict[str, str], nodes: int, cpus: int) -> Iterator[Cluster]:
    """A head and `nodes` nodes of `cpus` CPUs each."""
    made = Cluster(folder, env)
    try:
        with ThreadPoolExecutor(max(1, nodes)) as pool:
            list(pool.map(made.add, [cpus] * nodes))
        wait_for(lambda: census(made)["nodes"] == nodes + 1, "the cluster")
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
    done = subprocess.run(
        [sys.executable, "-c", _WHAT_IS_HELD], env=made.env, capture_output=True, text=True, check=False
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"nodes"')]  # Ray prints lines too
    if not lines:
        return {"nodes": 0, "held": {"?": 0}, "groups": -1, "actors": [done.stderr[-300:]]}
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


def wait_for(ready: Callable[[], Any], what: str, patience: float = _PATIENCE) -> Any:
    """Wait until `ready` returns a true value, and return it; raises TimeoutError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear within {patience:.0f} s.")
        time.sleep(0.2)
    return found


@dataclass
class Search:
    """The driver process of one search, restarted whenever it was killed."""

    name: str
    words: list[str]
    env: dict[str, str]
    folder: Path
    driver: "subprocess.Popen[bytes]" = field(init=False)

    def start(self) -> "Search":
        with (
            (self.folder / f"{self.name}.json").open("wb") as out,
            (self.folder / f"{self.name}.log").open("ab") as log,
        ):
            self.driver = subprocess.Popen(
                [sys.executable, "tune/search.py", "--name", self.name, *self.words],
                cwd=ROOT, env=self.env, stdout=out, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    def kill(self) -> None:
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def end(self) -> None:
        """Leave nothing running."""
        if not self.has_ended:
            self.kill()

    @property
    def has_ended(self) -> bool:
        return self.driver.poll() is not None

    def checkpoints(self) -> dict[str, str]:
        """The last checkpoint of every trial."""
        workers = Storage(f"{self.env['DSKD_STORAGE']}/{self.name}/workers")
        trials = [(f"{workers.uri}/{name}", each) for name in workers.names("") for each in workers.names(name)]
        return {f"{place}/{trial}": newest_checkpoint(place, trial) for place, trial in trials}

    def outcome(self, seconds: float) -> dict[str, Any]:
        """The first category's result in the search's JSON document.

        Raises RuntimeError with the end of its log if it failed.
        """
        code = self.driver.wait(seconds)
        log = (self.folder / f"{self.name}.log").read_text()
        if code != 0:
            raise RuntimeError(f"{self.name} ended with exit code {code}:\n{log[-3000:]}")
        outcome: dict[str, Any] = json.loads(self._document())["categories"][0]
        return outcome

    def _document(self) -> str:
        return (self.folder / f"{self.name}.json").read_text()


@dataclass
class Job(Search):
    """A search submitted as a job: the head runs it with uploaded code."""

    made: Cluster

    def start(self) -> "Job":
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.driver = subprocess.Popen(
                ["ray", "job", "submit", "--address", self.made.dashboard, "--working-dir", ".", "--",
                 "python", "tune/search.py", "--name", self.name, *self.words],
                cwd=ROOT, env=self.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    def kill(self) -> None:
        """Kill the job's process on the head; the submitting command then ends."""
        for each in wait_for(lambda: self.has_ended or self._entrypoints(), "the job's process") or ():
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        self.driver.wait(_PATIENCE)

    def _entrypoints(self) -> list[Process]:
        return [each for each in self.made.all() if each.title.startswith(f"python tune/search.py --name {self.name} ")]

    def _document(self) -> str:
        log = (self.folder / f"{self.name}.log").read_text()
        start = log.rindex(f'{{\n  "name": "{self.name}"')
        return log[start : log.index("\n}\n", start) + 2]


def disturb(made: Cluster, search: Search, options: Options, say: Callable[[str], None]) -> Counter[str]:
    """Kill by the schedule until it is complete or the search has ended; returns the number of kills by kind."""
    rng = random.Random(options.seed)
    kinds = [kind for kind in KINDS if options.workers_per_trial > 1 or kind != "controller"]
    schedule = [kind for _ in range(-(-options.kills // len(kinds))) for kind in rng.sample(kinds, len(kinds))]
    killed: Counter[str] = Counter()
    for kind in schedule[: options.kills]:
        # Wait until a trial has got on; otherwise several kills would act as one.
        before = search.checkpoints()
        wait_for(lambda: search.has_ended or search.checkpoints() != before, "another checkpoint")  # noqa: B023
        deadline = time.monotonic() + rng.uniform(0, options.longest_pause)
        while time.monotonic() < deadline and not search.has_ended:
            made.all()
            time.sleep(0.2)
        if search.has_ended:
            break
        struck = False
        while not (struck or search.has_ended):
            struck = _strike(kind, made, search, rng, options.cpus_per_node)
        if not struck:
            break
        killed[kind] += 1
        say(f"kill {sum(killed.values())}: {kind}")
    return killed


def _strike(kind: str, made: Cluster, search: Search, rng: random.Random, cpus: int) -> bool:
    """Kill one target of a kind, and restart it if Ray would not; False if there is none now."""
    if kind == "driver":
        search.kill()
        search.start()
        return True
    if kind == "node":
        made.kill_node(rng.choice(made.nodes))
        made.add(cpus)
        return True
    if kind == "worker's node":
        found = {made.node_of(each) for each in made.find("worker")}
        nodes = [node for node in made.nodes if node in found]
        if not nodes:
            time.sleep(0.2)
            return False
        made.kill_node(rng.choice(nodes))
        made.add(cpus)
        return True
    targets = made.find(kind)
    if not targets:
        time.sleep(0.2)
        return False
    try:
        os.kill(rng.choice(targets).pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended
        return False
    return True


class Account(NamedTuple):
    """State of a search's trials, as recorded by MLflow and Optuna."""

    statuses: Counter[str]
    doubled: int
    """Extra runs of the same trial, and extra finished trials of the study."""
    redone: int
    """Epochs that were reported twice."""
    untracked: int
    """Epochs before a trial's last that are missing in MLflow."""
    champion: tuple[tuple[str, str], ...]
    """Configuration and objective of the best finished trial."""


def study_of(url: str, name: str, category: str) -> optuna.Study:
    """The study of a search's category, whose name in a shared database has a part of its own at its end."""
    (found,) = [known for known in optuna.get_all_study_names(url) if known.split("/")[:2] == [name, category]]
    return optuna.load_study(study_name=found, storage=url)


def account(env: dict[str, str], name: str, category: str, trials: int) -> Account:
    """Count the trials of a search that has ended."""
    client = MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, name
    runs = [run for run in client.search_runs([experiment.experiment_id], max_results=5000) if _is_trial(run)]
    known = [run for run in runs if run.data.tags["dskd.status"] != "lost"]
    redone = untracked = 0
    for run in known:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
        redone += len(steps) - len(set(steps))
        untracked += max(steps, default=0) - len(set(steps))
    names = Counter(run.data.tags["dskd.trial"] for run in runs)
    study = study_of(env["DSKD_STUDY_STORAGE"], name, category)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    best = max(
        (run for run in known if run.data.tags["dskd.status"] == "finished"),
        key=lambda run: float(run.data.metrics["val/best_objective"]),
    )
    return Account(
        statuses=Counter(run.data.tags["dskd.status"] for run in runs),
        doubled=sum(count - 1 for count in names.values()) + max(0, len(complete) - trials),
        redone=redone,
        untracked=untracked,
        champion=(*sorted(best.data.params.items()), ("objective", f"{best.data.metrics['val/best_objective']:.6f}")),
    )


def pull(env: dict[str, str], name: str, folder: Path) -> list[str]:
    """Pull every champion of a search; returns the categories whose detector loads."""
    subprocess.run(
        [sys.executable, "tune/pull.py", "all", "--name", name, "--storage", env["DSKD_STORAGE"], "--out", str(folder)],
        cwd=ROOT, env=env, check=True, capture_output=True,
    )  # fmt: skip
    arrived = sorted(each for each in folder.iterdir() if each.is_dir())
    return [each.name for each in arrived if Detector.load(each)]


def _is_trial(run: Run) -> bool:
    return "mlflow.parentRunId" in run.data.tags


def environment(folder: Path) -> dict[str, str]:
    """Environment of all processes: servers of this process's environment if any, a token, a checkpoint every epoch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DSKD_CHECKPOINT"))}
    embedded = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "DSKD_STUDY_STORAGE": f"sqlite:///{folder}/optuna.db",
        "DSKD_STORAGE": str(folder / "results"),
    }
    return embedded | kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "DSKD_CHECKPOINT_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(options: Options, folder: Path) -> bool:
    """Run both searches; True if nothing was lost, doubled or left behind."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", flush=True)

    data = options.data
    if data is None:
        data = folder / "data"
        draw_dataset(data, categories=("flange",), num_train=16, num_test=12, image_size=64)
    category = sorted(each.name for each in data.iterdir() if each.is_dir())[0]
    env = environment(folder)
    if options.submit:
        del env["PYTHONPATH"]  # the job must use its uploaded code
    with ExitStack() as stack:
        made = stack.enter_context(cluster(folder, env, options.nodes, options.cpus_per_node))
        words = [
            "--data", str(data), "--categories", category, "--address", made.address, "--storage", env["DSKD_STORAGE"],
            "--teacher-weights", "random", "--folds", "0", "--image-size", str(options.image_size), "--batch-size", "4",
            "--epochs", str(options.epochs), "--trials", str(options.trials), "--json",
            "--workers-per-trial", str(options.workers_per_trial), "--preset", options.preset,
            "--max-concurrent", str(options.max_concurrent),
        ]  # fmt: skip
        suffix = secrets.token_hex(3)  # servers may hold data of earlier runs

        def begin(name: str) -> Search:
            args = (f"{name}-{suffix}", words, env, folder)
            begun = (Job(*args, made) if options.submit else Search(*args)).start()
            stack.callback(begun.end)
            return begun

        calm = begin("calm")
        calm.outcome(3600)
        reference = account(env, calm.name, category, options.trials)
        say(f"undisturbed: {dict(reference.statuses)}")
        search = begin("chaos")
        killed = disturb(made, search, options, say)
        outcome = search.outcome(3600)
        say("the disturbed search has ended")
        found = account(env, search.name, category, options.trials)
        # Ray's own cleaners look every few seconds.
        deadline = time.monotonic() + 60
        while (held := census(made)) and time.monotonic() < deadline:
            if not (held["held"] or held["groups"] or held["actors"] or made.zombies()):
                break
            time.sleep(2)
        zombies = made.zombies()
    pulled = pull(env, search.name, folder / "detectors")
    total = sum(killed.values())
    lost = options.trials - (sum(found.statuses.values()) - found.statuses["lost"])
    is_same = found.champion == reference.champion
    judged = [
        (f"kills              {total} of {options.kills}: {dict(killed)}", total == options.kills),
        (f"trials             {outcome['num_trials']} of {options.trials}: {dict(found.statuses)}",
         outcome["num_trials"] == options.trials),
        (f"trials lost        {lost}", lost == 0),
        (f"trials doubled     {found.doubled}", found.doubled == 0),
        (f"epochs redone      {found.redone}", found.redone <= total * options.max_concurrent),
        (f"epochs untracked   {found.untracked}", True),
        (f"champion           {'the same' if is_same else _difference(found.champion, reference.champion)}", is_same),
        (f"zombie processes   {len(zombies)} {[each.title for each in zombies]}", not zombies),
        (f"still held         {held['held'] or '-'} groups {held['groups']} actors {held['actors'] or '-'}",
         not held["held"] and not held["groups"] and not held["actors"]),
        (f"pulled             {', '.join(pulled) or '-'}", pulled == [category]),
    ]  # fmt: skip
    for line, is_right in judged:
        print(line if is_right else f"{line}   WRONG")
    return all(is_right for _, is_right in judged)


def _difference(found: Sequence[tuple[str, str]], reference: Sequence[tuple[str, str]]) -> str:
    pairs = zip(found, reference, strict=True)
    return ", ".join(f"{name} {mine} instead of {other}" for (name, mine), (_, other) in pairs if mine != other)


def main() -> None:
    """Exit with code 1 if a search lost, doubled or left something."""
    options = tyro.cli(Options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # otherwise the cluster would keep running
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if run(options, options.folder.resolve()) else 1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        sys.exit(0 if run(options, Path(folder)) else 1)


if __name__ == "__main__":
    main()
