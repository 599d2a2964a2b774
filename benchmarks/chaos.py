"""Disturbs searches in every way that is known to happen, and counts what they lose.

`python benchmarks/chaos.py --results FILE.jsonl` starts a Ray head and three nodes on this machine and draws a list of
faults (`chaos_faults.py`) by a seed. Searches of three categories, by several presets, with one and with two workers
per trial, meet a few of them each: processes are killed, ended or stand still, nodes and the head as well, servers are
away, slow or silent, a disk is full, a clock wrong, another driver comes, the storage is moved. The driver is started
again with the same command whenever it ends with an error, and nothing else is done. Each search is then compared with
one that was left alone: trials, champions, the bits of their weights, and what was left behind.

Servers are SQLite and a folder, or those of the environment (`python tests/services.py DIR &  . DIR/env`), reached
through links that can be cut. What was measured stands in the file, and the same command goes on where it was stopped.
Linux only: it finds its processes in /proc.
"""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import tyro
from chaos_faults import FAULTS, Fault, MissedError, World
from faulty_link import FaultyLink
from local_cluster import Cluster, census, start_cluster
from watched_search import Search, account, environment, pull

from dskd.checkpoint import WEIGHTS_FILE, sha256_of
from dskd.demo.dataset import draw_dataset
from tune.storage.files import Storage

NODES = 3
_CATEGORIES = ("board", "fabric", "flange")
_DISK_MEGABYTES = 2000
_ADDRESSES = {"s3": "AWS_ENDPOINT_URL", "mlflow": "MLFLOW_TRACKING_URI", "database": "DSKD_STUDY_STORAGE"}


class Setup(NamedTuple):
    """How a search is run."""

    preset: str
    workers: int
    """Of each trial."""
    at_once: int
    """Trials at once; with several, pruning depends on their speed, and so may the champion."""

    def __str__(self) -> str:
        return f"{self.preset}, {self.workers} worker{'s' * (self.workers > 1)}, {self.at_once} at once"


SETUPS = (
    Setup("stfpm", 1, 1),
    Setup("dskd", 2, 1),
    Setup("aand", 1, 1),
    Setup("rd4ad", 2, 1),
    Setup("stfpm", 1, 3),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Disturb searches, and count what they lose."""

    results: Path | None = None
    """File of what was measured, to which this run adds; a temporary one by default."""
    faults: int = 60
    seed: int = 0
    """Seed of the faults' order and of when they strike."""
    only: tuple[str, ...] = ()
    """Names of the faults to draw from, or the beginnings of their names; all by default."""
    per_search: int = 3
    """Faults that a search meets."""
    hours: float = 2.0
    """No other search begins after this time."""
    categories: int = 3
    trials: int = 2
    """Per category."""
    epochs: int = 60
    image_size: int = 32
    longest_pause: float = 6.0
    """Maximum seconds between a checkpoint and the next fault."""
    setups: tuple[int, ...] = tuple(range(len(SETUPS)))
    """Which of the setups take turns."""
    folder: Path | None = None
    """Folder for logs and searches, of a short path; a temporary one by default."""
    table: bool = False
    """Only print the table of --results."""


def linked(env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, FaultyLink]]:
    """The environment in which all servers are reached through links, and the links."""
    changed, links = dict(env), {}
    for server, variable in _ADDRESSES.items():
        address = urlsplit(env.get(variable, ""))
        if not address.port:
            continue
        links[server] = link = FaultyLink(str(address.hostname), address.port)
        old, new = f"{address.hostname}:{address.port}", f"127.0.0.1:{link.port}"
        changed = {name: value.replace(old, new) for name, value in changed.items()}
    return changed, links


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of its own at the folder; None without the right to mount one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MEGABYTES}m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Bench:
    """The cluster and servers of a run, on which one search after the other is disturbed."""

    def __init__(self, options: Options, folder: Path, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.options, self._folder, self._say = options, folder, say
        self._direct = environment(folder)
        self._env, self._links = linked(self._direct)
        self._env["DSKD_CHECKPOINT_SECONDS"] = "2"  # all checkpoints of the larger presets would be all there is to do
        for link in self._links.values():
            stack.callback(link.close)
        self._disk = stack.enter_context(small_disk(folder / "disk"))
        if self._disk is not None:
            self._env |= {"TMPDIR": str(self._disk), "XDG_CACHE_HOME": str(self._disk / "cache")}
        self._data = folder / "data"
        names = _CATEGORIES[: options.categories]
        draw_dataset(self._data, categories=names, num_train=16, num_test=12, image_size=64)
        self._made: Cluster = start_cluster(folder, dict(self._env), NODES, 1)
        stack.callback(lambda: self._made.stop())

    def abilities(self, setup: Setup) -> set[str]:
        """What faults may need, and there is."""
        found = {"two workers" if setup.workers > 1 else "one worker"}
        found |= {"servers"} if len(self._links) == len(_ADDRESSES) else set()
        found |= {"disk"} if self._disk is not None else set()
        found |= {"root"} if os.geteuid() == 0 else set()
        return found | ({"cc"} if shutil.which("cc") else set())

    def run(self, setup: Setup, faults: Sequence[Fault], seed: str) -> dict[str, Any]:
        """A search that meets the faults, or as many of them as it lives to see; its record."""
        began = time.monotonic()
        world = self._begin(setup, seed)
        record: dict[str, Any] = {"setup": str(setup), "faults": [], "wrong": []}
        try:
            for fault in faults:
                met: dict[str, Any] = {"name": fault.name, "remark": "", "said": [], "starts": 0}
                record["faults"].append(met)
                try:
                    self._meet(world, fault, met)
                except MissedError as missed:
                    record["faults"].remove(met)
                    self._say(f"{fault.name}: {missed}")
                if world.search.driver.poll() == 0:
                    break
            while world.search.driver.poll() != 0:
                world.wait_until_it_goes_on(world.search.checkpoints())
            record["seconds"] = round(time.monotonic() - began, 1)
            record["starts"] = world.num_starts
            record |= self._judge(world, setup)
            if not record["wrong"]:  # else it is kept, to be looked at
                Storage(world.search.env["DSKD_STORAGE"]).remove(world.search.name)
        except (AssertionError, TimeoutError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            self._say(f"wrong: {error}")
            record["wrong"].append(f"{type(error).__name__}: {error}")
        finally:
            world.search.end()
            self._made = world.made
        if record["wrong"] or self._made.env.get("PYTHONPATH") != self._env["PYTHONPATH"]:
            world.made.env = dict(self._env)
            world.replace_cluster()
            self._made = world.made
        return record

    def _begin(self, setup: Setup, seed: str) -> World:
        options = self.options
        words = [
            "--data", str(self._data), "--address", self._made.address, "--storage", self._env["DSKD_STORAGE"],
            "--teacher-weights", "random", "--folds", "0", "--image-size", str(options.image_size), "--batch-size", "4",
            "--epochs", str(options.epochs), "--trials", str(options.trials), "--preset", setup.preset, "--json",
            "--workers-per-trial", str(setup.workers), "--max-concurrent", str(setup.at_once),
        ]  # fmt: skip
        # Servers may hold what earlier runs left under the same name.
        search = Search(f"chaos-{secrets.token_hex(4)}", words, self._env, self._folder).start()
        return World(
            search=search, made=self._made, folder=self._folder, nodes=NODES, rng=random.Random(seed),
            links=self._links, disk=self._disk,
        )  # fmt: skip

    def _meet(self, world: World, fault: Fault, met: dict[str, Any]) -> None:
        """Strike once the search has got on, and wait until it gets on again; writes into `met` what came of it."""
        world.wait_until_it_goes_on(world.search.checkpoints())
        time.sleep(world.rng.uniform(0, self.options.longest_pause))
        if world.search.driver.poll() == 0:
            raise MissedError("the search ended before")
        world.made.all()
        before, starts = world.search.checkpoints(), world.num_starts
        began = time.monotonic()
        self._say(f"{fault.name} …")
        met["remark"] = fault.strike(world)
        if world.search.has_ended:  # what it stored at its end is no sign that it went on
            before = world.search.checkpoints()
        met["said"] = world.wait_until_it_goes_on(before)
        met["seconds"] = round(time.monotonic() - began, 1)
        met["starts"] = world.num_starts - starts
        self._say(f"{fault.name}: went on after {met['seconds']} s; {met['remark']} {met['said'] or ''}")

    def _judge(self, world: World, setup: Setup) -> dict[str, Any]:
        """What the search came to, and what is wrong with it."""
        search, trials = world.search, self.options.trials
        wrong: list[str] = []
        champions: dict[str, list[Any]] = {}
        counts: Counter[str] = Counter()
        for outcome in search.outcomes(60):
            category = outcome["category"]
            found = account(self._direct, search.name, category, trials)
            lost = trials - (sum(found.statuses.values()) - found.statuses["lost"])
            counts.update(lost=lost, doubled=found.doubled, redone=found.redone, untracked=found.untracked)
            if outcome["num_trials"] != trials or outcome["num_failed"]:
                wrong.append(f"{category}: {outcome['num_trials']} trials, {outcome['num_failed']} failed")
            champions[category] = [list(each) for each in found.champion]
        if "Traceback" in search.said:
            wrong.append("a traceback in what the driver said")
        records = Storage(f"{search.env['DSKD_STORAGE']}/{search.name}").files("trials")
        if len(records) != trials * len(champions):
            wrong.append(f"{len(records)} records of trials")
        detectors = self._folder / f"{search.name}-detectors"
        pulled = pull(self._direct | {"DSKD_STORAGE": search.env["DSKD_STORAGE"]}, search.name, detectors)
        if pulled != sorted(champions):
            wrong.append(f"pulled {pulled}")
        for category in pulled:
            champions[category].append(["weights", sha256_of(detectors / category / WEIGHTS_FILE)])
        wrong += [f"{count} trials {what}" for what, count in counts.items() if what in ("lost", "doubled") and count]
        wrong += self._left_behind(world)
        return {"champions": champions, **counts, "wrong": wrong}

    def _left_behind(self, world: World) -> list[str]:
        """Processes, resources and files of searches although none runs."""
        deadline = time.monotonic() + 60  # Ray's own cleaners look every few seconds
        while True:
            held, zombies = census(world.made), world.made.zombies()
            files = self._temporary()
            left = [f"zombie {each.title}" for each in zombies] + [f"file {name}" for name in files]
            left += [f"held {held[kind]}" for kind in ("held", "groups", "actors") if held[kind]]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(2)

    def _temporary(self) -> list[str]:
        return [] if self._disk is None else sorted(each.name for each in self._disk.glob("dskd-*"))


def schedule(options: Options) -> list[str]:
    """Names of the faults in the order in which they are to strike: every one before any comes again."""
    rng = random.Random(options.seed)
    names = [name for name in FAULTS if not options.only or name.startswith(options.only)]
    drawn = [name for _ in range(-(-options.faults // len(names))) for name in rng.sample(names, len(names))]
    return drawn[: options.faults]


def chosen(names: Sequence[str], abilities: set[str], number: int) -> list[Fault]:
    """The next faults that can be brought about."""
    return [FAULTS[name] for name in names if FAULTS[name].needs <= abilities][:number]


class Run:
    """Searches that meet the faults of a list, and what was found of each."""

    def __init__(self, options: Options, results: Path) -> None:
        """Goes on with the records in the file `results`; exits if they are of other searches."""
        self._options, self._results = options, results
        self.records = read(results)
        self._size = [options.categories, options.trials, options.epochs, options.image_size]
        if any(record["size"] != self._size for record in self.records):
            sys.exit(f"{results} was measured with other categories, trials, epochs or image size; name another file.")
        self.left = schedule(options)
        for record in self.records:
            self._strike_off(record)
        self._num_empty = 0

    def leave_out_impossible(self, bench: Bench) -> list[str]:
        """Names of the faults that no setup can meet here; they are no longer in the list."""
        possible = {
            fault.name
            for index in self._options.setups
            for fault in chosen(self.left, bench.abilities(SETUPS[index]), len(self.left))
        }
        impossible = sorted(set(self.left) - possible)
        self.left = [name for name in self.left if name in possible]
        return impossible

    def is_over(self, seconds: float) -> bool:
        """Whether the list is through, the time is up, or no search met any fault in a whole round."""
        return not self.left or seconds > self._options.hours * 3600 or self._num_empty > len(self._options.setups)

    def next_search(self, bench: Bench, say: Callable[[str], None]) -> None:
        """Run the next search: the first of a setup, if its champions are to be compared, is left alone."""
        number = sum(not record["is_reference"] for record in self.records) + self._num_empty
        setup = SETUPS[self._options.setups[number % len(self._options.setups)]]
        reference = _reference(self.records, setup)
        is_reference = setup.at_once == 1 and reference is None
        faults = [] if is_reference else chosen(self.left, bench.abilities(setup), self._options.per_search)
        say(f"{setup}: {', '.join(fault.name for fault in faults) or 'undisturbed'}")
        record = bench.run(setup, faults, f"{self._options.seed} {len(self.records)}")
        record |= {"is_reference": is_reference, "size": self._size}
        if reference and record.get("champions", reference["champions"]) != reference["champions"]:
            record["wrong"].append(f"other champions than undisturbed: {_difference(record, reference)}")
        say(f"wrong: {record['wrong']}" if record["wrong"] else "nothing lost, doubled or left behind")
        has_got_on = bool(record["faults"]) or (is_reference and not record["wrong"])
        self._num_empty = 0 if has_got_on else self._num_empty + 1
        self.records.append(record)
        with self._results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._strike_off(record)

    def _strike_off(self, record: Mapping[str, Any]) -> None:
        for fault in record["faults"]:
            with suppress(ValueError):
                self.left.remove(fault["name"])


def run(options: Options, folder: Path) -> bool:
    """Disturb searches until the list is through or the time is up; whether it is through and nothing was wrong.

    Adds a line to `options.results` for each search.
    """
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", flush=True)

    searches = Run(options, options.results or folder / "results.jsonl")
    with ExitStack() as stack:
        bench = Bench(options, folder, stack, say)
        for name in searches.leave_out_impossible(bench):
            say(f"left out, as it needs {', '.join(sorted(FAULTS[name].needs))}: {name}")
        while not searches.is_over(time.monotonic() - started):
            searches.next_search(bench, say)
    print(table(searches.records))
    return not searches.left and not any(record["wrong"] for record in searches.records)


def _reference(records: Sequence[Mapping[str, Any]], setup: Setup) -> Mapping[str, Any] | None:
    known = (record for record in records if record["is_reference"] and record["setup"] == str(setup))
    return next((record for record in known if not record["wrong"]), None)


def _difference(record: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    pairs = [(category, dict(found), dict(reference["champions"][category]))
             for category, found in record["champions"].items()]  # fmt: skip
    return "; ".join(
        f"{category} {name} {found.get(name)} instead of {other.get(name)}"
        for category, found, other in pairs
        for name in sorted(found.keys() | other.keys())
        if found.get(name) != other.get(name)
    )


def read(results: Path) -> list[dict[str, Any]]:
    """The records in a file; none if it does not exist."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: each kind of fault, how often it struck, how long until the search went on, and what was wrong."""
    met: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    wrong: dict[str, list[str]] = defaultdict(list)
    disturbed = [record for record in records if not record["is_reference"]]
    for record in disturbed:
        for fault in record["faults"]:
            met[fault["name"]].append(fault)
            wrong[fault["name"]] += record["wrong"]
    lines = ["| fault | times | s until it went on | driver started again | remark | wrong |", f"|{'---|' * 6}"]
    for name in sorted(met, key=list(FAULTS).index):
        each = met[name]
        remarks = sorted({fault["remark"] for fault in each if fault["remark"]})
        lines.append(
            f"| {name} | {len(each)} | {_median(each)} | "
            f"{sum(fault['starts'] for fault in each)} | {'; '.join(remarks)} | {'; '.join(sorted(set(wrong[name])))} |"
        )
    total = Counter[str]()
    for record in disturbed:
        total.update({name: record.get(name, 0) for name in ("lost", "doubled", "redone", "untracked")})
    num_faults = sum(map(len, met.values()))
    lines.append(
        f"\n{num_faults} faults in {len(disturbed)} searches; trials lost {total['lost']}, doubled {total['doubled']}; "
        f"epochs redone {total['redone']}, untracked {total['untracked']}; searches with something wrong "
        f"{sum(bool(record['wrong']) for record in disturbed)}"
    )
    return "\n".join(lines)


def _median(met: Sequence[Mapping[str, Any]]) -> str:
    seconds = [fault["seconds"] for fault in met if "seconds" in fault]
    return f"{median(seconds):.0f}" if seconds else "–"


def main() -> None:
    """Exit with code 1 if a search lost, doubled or left something, or faults are left for another run."""
    options = tyro.cli(Options)
    if options.table:
        print(table(read(options.results or Path("results.jsonl"))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # otherwise the cluster would keep running
    # A shell's job in the background ignores Ctrl-C, and so would every driver that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if run(options, options.folder.resolve()) else 1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        sys.exit(0 if run(options, Path(folder)) else 1)


if __name__ == "__main__":
    main()
