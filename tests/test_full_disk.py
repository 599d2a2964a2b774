"""Disks that are really full: small ones of memory, in a mount namespace that ends with its process."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cluster import cluster, wait_for
from watched_search import Search, account, environment

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--teacher-weights", "random", "--batch-size", "4", "--preset", "stfpm"]


@pytest.fixture
def on_a_disk_of(tmp_path: Path) -> Callable[[str], list[str]]:
    """What to put before a command so that it sees a disk of so many bytes at `tmp_path / "disk"`."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def prefix(size: str) -> list[str]:
        mount = f'mount -t tmpfs -o size={size} none {disk} && exec "$@"'
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]

    if shutil.which("unshare") is None or subprocess.run([*prefix("1m"), "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    return prefix


def test_a_full_disk_of_the_cache_kills_nobody(on_a_disk_of: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Writing to a sparse file there would end in SIGBUS."""
    body = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom dskd.data.cache import ArrayCache\n"
        "cache = ArrayCache(Path(sys.argv[1]), 10**9)\n"
        "print(cache.get('small', (1000,), np.uint8, lambda array: array.fill(1)).sum())\n"
        "try:\n    cache.get('large', (2 * 10**6,), np.uint8, lambda array: array.fill(1))\n"
        "except OSError as error:\n    print(error)\n"
        "left = list(Path(sys.argv[1]).glob('*.partial'))\n"
        "print(cache.get('small', (1000,), np.uint8, None).sum(), len(left))\n"
    )
    done = subprocess.run(
        [*on_a_disk_of("1m"), sys.executable, "-c", body, str(tmp_path / "disk")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    first, reason, last = done.stdout.splitlines()
    assert (first, last) == ("1000", "1000 0") and reason.startswith("no room for 0.002 GB in the cache folder ")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_seconds", ["0", "3600"])
def test_a_training_whose_disk_is_full_says_so_and_leaves_nothing_half_written(
    on_a_disk_of: Callable[[str], list[str]], mvtec_root: Path, tmp_path: Path, checkpoint_seconds: str
) -> None:
    """At its first checkpoint, or where it would write the detector."""
    disk = tmp_path / "disk"
    words = [
        "-m", "dskd", "train", "--data", str(mvtec_root), "--category", "tile", "--out", str(disk / "tile"),
        "--epochs", "2", "--cache-gb", "0", "--checkpoint-seconds", checkpoint_seconds, "--image-size", "32", *TINY,
    ]  # fmt: skip
    look = ["sh", "-c", f'"$@"; code=$?; find {disk} -type f; exit $code', "sh"]
    done = subprocess.run(
        [*on_a_disk_of("3m"), *look, sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "error: " in last and "No space left on device" in last and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""


@pytest.mark.cluster
def test_a_node_whose_disk_fills_up_loses_no_trial(
    on_a_disk_of: Callable[[str], list[str]], mvtec_root: Path, cluster_folder: Path, tmp_path: Path
) -> None:
    """Cache and checkpoints of the one node lie on a full disk, until somebody makes room."""
    disk = tmp_path / "disk"
    env = environment(cluster_folder)
    with cluster(cluster_folder, env, 0, 1) as made:
        # A little stays free: Python looks for another place where it can write no temporary file at all.
        ballast = f"{disk}/ballast"
        fill = ["sh", "-c", f'cat /dev/zero > {ballast} 2> /dev/null; truncate -s -400K {ballast}; exec "$@"', "sh"]
        made.add(1, prefix=[*on_a_disk_of("300m"), *fill], env={"XDG_CACHE_HOME": str(disk), "TMPDIR": str(disk)})
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", "2",
            "--epochs", "4", "--storage", env["DSKD_STORAGE"], "--image-size", "128", "--json", *TINY,
        ]  # fmt: skip
        search = Search("full", words, env, cluster_folder).start()
        try:
            (node,) = made.nodes
            wait_for(lambda: made.find("worker"), "a worker")
            time.sleep(20)  # its first checkpoint finds no room
            assert not search.has_ended and " of 2 (" not in (cluster_folder / "full.log").read_text()
            assert not list(cluster_folder.rglob("training.pt"))
            Path(f"/proc/{node.pid}/root{ballast}").unlink()
            outcome = search.outcome(300)
        finally:
            search.end()
        log = (cluster_folder / "full.log").read_text()
        assert outcome["num_trials"] == 2 and outcome["num_failed"] == 0 and outcome["champion"], log
        assert "are kept only in memory: no room for " in log
        assert account(env, "full", "tile", 2).redone == 0, "the checkpoint waited, no trial began again"
