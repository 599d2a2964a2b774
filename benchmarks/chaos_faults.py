"""What can happen to a search: each fault by its name, and how it is brought about on this machine."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import boto3
from faulty_link import FaultyLink
from local_cluster import PATIENCE, Cluster, Process, census, signal_all, start_cluster, wait_for
from watched_search import ROOT, Search

from tune.storage.files import Storage

HANG_SECONDS = 60.0
"""How long what is stopped with SIGSTOP stands still."""
FOREVER_SECONDS = 150.0
"""A server that is away for ever is away until the driver ends, at most for so long."""
CLOCK_SECONDS = 600
"""How far a wrong clock is off."""
_ELSEWHERE = ("unshare", "--uts", "sh", "-c", 'hostname other; exec "$@"', "sh")
"""Put before a command: to it, this is another machine."""
_APPEAR_SECONDS = 60.0
_MAX_STARTS = 8
"""How often the driver may have to be started again after one fault."""


class MissedError(RuntimeError):
    """There was nothing to strike at; the fault is left for later."""


@dataclass(kw_only=True)
class World:
    """A search and all that it depends on, as a fault finds it."""

    search: Search
    made: Cluster
    folder: Path
    nodes: int
    rng: random.Random
    links: Mapping[str, FaultyLink] = field(default_factory=dict)
    """By server: s3, mlflow, database."""
    disk: Path | None = None
    """A small disk on which all nodes keep what is temporary; None without the right to mount one."""
    num_starts: int = 0
    """How often the driver was started again."""

    def find(self, kind: str) -> list[Process]:
        """Running processes of a kind; raises MissedError if none appears, or the search ends before."""
        with suppress(TimeoutError):
            wait_for(lambda: self.search.has_ended or self.made.find(kind), kind, _APPEAR_SECONDS)
        if found := self.made.find(kind):
            return found
        raise MissedError(f"no {kind}")

    def replace_cluster(self) -> None:
        """End what is left of the cluster, and start another at its address."""
        self.made.stop()
        port = int(self.made.address.rpartition(":")[2])
        env = {name: value for name, value in self.made.env.items() if name != "RAY_ADDRESS"}
        self.made = start_cluster(self.folder, env, self.nodes, 1, port)

    def make_whole(self) -> None:
        """As many nodes as there were, as a cluster manager would see to."""
        present = census(self.made)["nodes"]
        if present == 0:
            self.replace_cluster()
            return
        for node in list(self.made.nodes):
            if node.poll() is not None:
                self.made.kill_node(node)
        for _ in range(self.nodes - len(self.made.nodes)):
            self.made.add(1)

    def wait_until_it_goes_on(self, before: Mapping[str, str]) -> list[str]:
        """Wait for a checkpoint that is not among those `before`, or the search's end.

        A driver that has ended with an error is started again; returns what each of those said last. Raises
        TimeoutError if nothing happens for `PATIENCE` seconds, RuntimeError if too many drivers end.
        """
        said: list[str] = []
        since = time.monotonic()
        while (code := self.search.driver.poll()) != 0 and self.search.checkpoints() == before:
            if code is not None:
                lines = self.search.said.strip().splitlines()
                said.append(f"{code}: {lines[-1] if lines else ''}")
                if len(said) > _MAX_STARTS:
                    raise RuntimeError(f"the driver ended {len(said)} times: {said[-1]}")
                self.make_whole()
                self.search.start()
                self.num_starts += 1
                since = time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(f"nothing went on within {PATIENCE:.0f} s")
            time.sleep(0.5)
        return said

    def stop_driver(self, number: signal.Signals = signal.SIGTERM) -> str:
        """End the driver as a person does; raises AssertionError unless it ends within 10 s and says that it did."""
        began = time.monotonic()
        self.search.driver.send_signal(number)
        code = self.search.driver.wait(PATIENCE)
        seconds = time.monotonic() - began
        if code == 0:
            raise MissedError("the search ended before")
        assert code == 128 + number and seconds <= 10, f"ended with {code} after {seconds:.1f} s"
        return f"{code} after {seconds:.1f} s"


class Fault(NamedTuple):
    """A way to disturb a search."""

    name: str
    strike: Callable[[World], str]
    """Brings it about and ends it; returns a remark, or raises MissedError, or AssertionError on a wrong answer."""
    needs: frozenset[str] = frozenset()
    """"servers", "disk", "cc", "root", "two workers", "one worker"."""


_SIGNALS = MappingProxyType({"killed": signal.SIGKILL, "ended (SIGTERM)": signal.SIGTERM, "hangs": signal.SIGSTOP})


def _of_process(kind: str, how: str) -> Callable[[World], str]:
    def strike(world: World) -> str:
        target = world.rng.choice(world.find(kind))
        signal_all([target.pid], _SIGNALS[how])
        if how == "hangs":
            time.sleep(HANG_SECONDS)
            signal_all([target.pid], signal.SIGCONT)
        return ""

    return strike


def _driver_killed(world: World) -> str:
    world.search.kill()
    return ""


def _driver_ended(world: World) -> str:
    return world.stop_driver()


def _driver_interrupted(world: World) -> str:
    return world.stop_driver(signal.SIGINT)


def _driver_hangs(world: World) -> str:
    signal_all([world.search.driver.pid], signal.SIGSTOP)
    time.sleep(HANG_SECONDS)
    signal_all([world.search.driver.pid], signal.SIGCONT)
    return ""


def _node_killed(world: World) -> str:
    world.made.kill_node(world.rng.choice(world.made.nodes))
    world.made.add(1)
    return ""


def _working_node_killed(world: World) -> str:
    places = {world.made.node_of(each) for each in world.find("worker")}
    nodes = [node for node in world.made.nodes if node in places]
    if not nodes:
        raise MissedError("no worker's node")
    world.made.kill_node(world.rng.choice(nodes))
    world.made.add(1)
    return ""


def _node_ended(world: World) -> str:
    node = world.rng.choice(world.made.nodes)
    node.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        node.wait(30)
    world.made.kill_node(node)
    world.made.add(1)
    return ""


def _node_hangs(world: World) -> str:
    places = {world.made.node_of(each) for each in world.find("worker")}
    node = world.rng.choice([node for node in world.made.nodes if node in places] or world.made.nodes)
    go_on = world.made.suspend(node)
    time.sleep(HANG_SECONDS)
    go_on()
    time.sleep(10)  # it finds out whether it was given up meanwhile
    if census(world.made)["nodes"] == world.nodes + 1:
        return "is still a member"
    if node in world.made.nodes:
        world.made.kill_node(node)
        world.made.add(1)
    return "was given up and replaced"


def _after_head(world: World) -> str:
    """What the driver did without a head, which now gets a successor."""
    began = time.monotonic()
    with suppress(TimeoutError):
        wait_for(lambda: world.search.has_ended, "the driver's end", FOREVER_SECONDS)
    if world.search.has_ended:
        remark = f"the driver ended with {world.search.driver.returncode} after {time.monotonic() - began:.0f} s"
    else:
        remark = f"the driver waited for {FOREVER_SECONDS:.0f} s and was killed"
        world.search.kill()
    world.replace_cluster()
    return remark


def _head_killed(world: World) -> str:
    world.made.kill_head()
    return _after_head(world)


def _head_ended(world: World) -> str:
    world.made.head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        world.made.head.wait(30)
    return _after_head(world)


def _head_hangs(world: World) -> str:
    go_on = world.made.suspend(world.made.head)
    time.sleep(HANG_SECONDS)
    go_on()
    time.sleep(10)
    world.make_whole()
    return ""


def _server(name: str, state: str, seconds: float) -> Callable[[World], str]:
    def strike(world: World) -> str:
        with world.links[name].faulty(state, seconds):
            pass
        return ""

    return strike


def _server_gone(name: str) -> Callable[[World], str]:
    def strike(world: World) -> str:
        link, began = world.links[name], time.monotonic()
        link.state = "cut"
        try:
            wait_for(lambda: world.search.has_ended, "the driver's end", FOREVER_SECONDS)
        except TimeoutError:
            return f"the driver waited for {FOREVER_SECONDS:.0f} s"
        finally:
            link.state = "sound"
        lines = world.search.said.strip().splitlines()
        code = world.search.driver.returncode
        return f"the driver ended with {code} after {time.monotonic() - began:.0f} s: {lines[-1] if lines else ''}"

    return strike


def _disk_full(world: World) -> str:
    assert world.disk is not None
    ballast = world.disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    # A little stays free: Python looks for another place where it can write no temporary file at all.
    os.truncate(ballast, max(0, ballast.stat().st_size - 400 * 1024))
    time.sleep(20)
    ballast.unlink()
    return ""


def shifted_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Environment in which the wall clock is ahead; needs a C compiler, and writes a library into the folder."""
    library = folder / "shifted_clock.so"
    if not library.exists():
        source = Path(__file__).with_name("shifted_clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(seconds)}


def _node_with_another_clock(world: World) -> str:
    node = world.rng.choice(world.made.nodes)
    world.made.kill_node(node)
    world.made.add(1, env=shifted_clock(world.folder, CLOCK_SECONDS))
    return "such a node replaces another"


def _driver_with_another_clock(seconds: int) -> Callable[[World], str]:
    """The driver is lost, one on a machine of another clock follows, and yet another is refused."""

    def strike(world: World) -> str:
        right, owner = world.search.env, _lease_owner(world)
        world.search.kill()
        world.search.env = right | shifted_clock(world.folder, seconds)
        world.search.start(_ELSEWHERE)
        wait_for(lambda: world.search.has_ended or _lease_owner(world) not in ("", owner), "the next driver's lease")
        assert not world.search.has_ended, f"the next driver ended with {world.search.driver.returncode}"
        return f"with a right clock another is {_refused(world, right)}"

    return strike


def _second_driver(world: World) -> str:
    return _refused(world, world.search.env)


def _refused(world: World, env: Mapping[str, str]) -> str:
    """What becomes of another driver: "refused", or AssertionError."""
    done = subprocess.run(
        world.search.command, cwd=world.search.code, env=env, capture_output=True, text=True, check=False
    )  # fmt: skip
    if world.search.has_ended:
        raise MissedError("the search ended before")
    said = [line for line in done.stderr.splitlines() if "still preparing" not in line]  # on a busy machine
    assert done.returncode == 2 and len(said) == 1 and "runs already" in said[0], (done.returncode, said[-3:])
    return "refused"


def _lease_owner(world: World) -> str:
    """Empty if nobody holds it."""
    lease = Storage(f"{world.search.env['DSKD_STORAGE']}/{world.search.name}").read_json("lease.json") or {}
    return str(lease.get("owner", ""))


def _lease_taken(world: World) -> str:
    """A driver stands still, another takes over from what seems another machine, and the first wakes up."""
    first, owner = world.search.driver, _lease_owner(world)
    signal_all([first.pid], signal.SIGSTOP)
    world.search.start(_ELSEWHERE)
    try:
        wait_for(lambda: world.search.has_ended or _lease_owner(world) not in ("", owner), "the second driver's lease")
        assert not world.search.has_ended, f"the second driver ended with {world.search.driver.returncode}"
    finally:
        signal_all([first.pid], signal.SIGCONT)
    began = time.monotonic()
    code = first.wait(PATIENCE)
    seconds = time.monotonic() - began
    assert code == 1 and seconds <= 20, f"the first driver ended with {code} after {seconds:.1f} s"
    return f"the first ended with 1 after {seconds:.1f} s"


def _job_stopped(world: World) -> str:
    """The search goes on as a job, which `ray job stop` ends."""
    world.stop_driver()
    address, name = ("--address", world.made.dashboard), f"stopped-{world.rng.randrange(1 << 32):08x}"
    env = world.made.env
    words = ["python", str(world.search.code / "tune/search.py"), *world.search.command[2:]]
    before = world.search.checkpoints()
    submit = ["ray", "job", "submit", *address, "--no-wait", "--submission-id", name, "--", *words]
    subprocess.run(submit, env=env, cwd=world.folder, check=True, capture_output=True)
    wait_for(lambda: world.search.checkpoints() != before, "the job's work")
    began = time.monotonic()
    subprocess.run(["ray", "job", "stop", *address, name], env=env, check=True, capture_output=True)
    seconds = time.monotonic() - began
    assert not _lease_owner(world), "the lease was kept"
    return f"ray job stop took {seconds:.1f} s; the lease was given back"


def _storage_moved(world: World) -> str:
    remark = world.stop_driver()
    old = world.search.env["DSKD_STORAGE"]
    new = f"{old}-moved"
    move_search(old, new, world.search.name)
    words = [new if word == old else word for word in world.search.words]
    world.search.words, world.search.env = words, world.search.env | {"DSKD_STORAGE": new}
    return remark


def move_search(old: str, new: str, name: str) -> None:
    """Move a search's folder, with whatever there is, to another storage address."""
    if not old.startswith("s3://"):
        Path(new).mkdir(exist_ok=True)
        shutil.move(f"{old}/{name}", f"{new}/{name}")
        return
    bucket_name, _, source = old.removeprefix("s3://").partition("/")
    target = new.removeprefix("s3://").partition("/")[2]
    bucket = boto3.resource("s3").Bucket(bucket_name)
    for each in bucket.objects.filter(Prefix=f"{source}/{name}/"):
        bucket.copy({"Bucket": bucket_name, "Key": each.key}, f"{target}{each.key.removeprefix(source)}")
        each.delete()


def _upgraded(world: World) -> str:
    """The driver is stopped, and it and a new cluster go on with the code of a later version."""
    remark = world.stop_driver()
    code = world.folder / f"upgraded-{world.rng.randrange(1 << 32):08x}"
    for part in ("dskd", "tune"):
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    config = code / "dskd/config.py"
    lines = config.read_text().splitlines(keepends=True)
    (number,) = (index for index, line in enumerate(lines) if line.startswith("VERSION = "))
    lines[number] = 'VERSION = "99.0.0"\n'
    config.write_text("".join(lines))
    paths = {"PYTHONPATH": str(code)}
    world.search.code, world.search.env = code, world.search.env | paths
    world.made.env |= paths
    world.replace_cluster()
    return remark


def _all_faults() -> Iterator[Fault]:
    servers, pair, lone = frozenset({"servers"}), frozenset({"two workers"}), frozenset({"one worker"})
    for how in _SIGNALS:
        for kind in ("worker", "relay", "dispatcher", "study", "queue"):
            yield Fault(f"{kind} {how}", _of_process(kind, how))
        yield Fault(f"controller {how}", _of_process("controller", how), pair)
    yield Fault("driver killed", _driver_killed)
    yield Fault("driver ended (SIGTERM)", _driver_ended)
    yield Fault("driver ended (Ctrl-C)", _driver_interrupted)
    yield Fault("driver hangs", _driver_hangs)
    yield Fault("node killed", _node_killed)
    yield Fault("worker's node killed", _working_node_killed)
    yield Fault("node ended (SIGTERM)", _node_ended)
    yield Fault("node hangs", _node_hangs)
    yield Fault("head killed", _head_killed)
    yield Fault("head ended (SIGTERM)", _head_ended)
    yield Fault("head hangs", _head_hangs)
    for name in ("s3", "mlflow", "database"):
        yield Fault(f"{name} away for 5 s", _server(name, "cut", 5), servers)
        yield Fault(f"{name} away for 60 s", _server(name, "cut", 60), servers)
        yield Fault(f"{name} away for ever", _server_gone(name), servers)
        yield Fault(f"{name} slow (2 s a request)", _server(name, "slow", 60), servers)
        yield Fault(f"{name} half-open for 60 s", _server(name, "silent", 60), servers)
    yield Fault("disk full for 20 s", _disk_full, frozenset({"disk"}))
    yield Fault("node's clock ahead", _node_with_another_clock, frozenset({"cc"}))
    for way, seconds in (("ahead", CLOCK_SECONDS), ("behind", -CLOCK_SECONDS)):
        yield Fault(f"driver's clock {way}", _driver_with_another_clock(seconds), frozenset({"cc", "root"}))
    yield Fault("second driver", _second_driver)
    yield Fault("lease taken", _lease_taken, lone | {"root"})
    yield Fault("ray job stop", _job_stopped)
    yield Fault("storage moved", _storage_moved)
    yield Fault("upgraded", _upgraded)


FAULTS: Mapping[str, Fault] = MappingProxyType({fault.name: fault for fault in _all_faults()})
