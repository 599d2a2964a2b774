import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dskd.checkpoint import WEIGHTS_FILE, read_record, sha256_of
from dskd.cli.main import main
from dskd.training.resume import has_state, training_folder
from dskd.training.run import STATE_FILE

STEPS = 145
"""Of which 10 or 11 lie between two validations; batches of 3 out of 8 images."""
FIGURES = ("step", "loss", "encoder_loss", "decoder_loss", "hard_loss", "val/objective", "val/aupro")


def words(data: Path, out: Path, *more: object) -> list[str]:
    given = [
        "train", "--data", data, "--category", "tile", "--out", out, "--image-size", "32", "--backbone", "test_resnet",
        "--levels", "1", "2", "--level-weights", "1", "1", "--score-level-weights", "1", "1", "--embedding-depth", "1",
        "--hkd-weight", "1", "--steps", STEPS, "--batch-size", "3", "--validation-fraction", "0.34",
        "--teacher-weights", "random", "--device", "cpu", "--checkpoint-seconds", "0", "--json", *more,
    ]  # fmt: skip
    return [str(word) for word in given]


def trained(data: Path, out: Path, *more: object) -> tuple[dict[str, Any], list[str]]:
    """The JSON document of a whole `dskd train`, and what it said."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        main(words(data, out, *more))
    return json.loads(printed.getvalue()), said.getvalue().splitlines()


def refused(data: Path, out: Path, *more: object) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        main(words(data, out, *more))
    assert end.value.code == 2
    return said.getvalue().splitlines()[-1]


def curve(document: dict[str, Any]) -> list[tuple[float, ...]]:
    return [tuple(interval[name] for name in FIGURES) for interval in document["history"]]


@pytest.fixture(scope="module")
def killed(mvtec_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a detector would lie, had its training not been killed after some steps."""
    out = tmp_path_factory.mktemp("killed") / "tile"
    child = subprocess.Popen(
        [sys.executable, "-m", "dskd", *words(mvtec_root, out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stderr is not None
    said = [child.stderr.readline()]
    while said[-1] and not said[-1].startswith("step   21/"):
        said.append(child.stderr.readline())
    try:
        child.send_signal(signal.SIGSTOP)
        assert "another process is training into" in refused(mvtec_root, out), said
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL, said
    child.stderr.close()
    assert not out.exists() and has_state(out.with_name("tile.training"))
    return out


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses_and_the_same_weights(
    killed: Path, mvtec_root: Path, tmp_path: Path
) -> None:
    assert "steps is 145 there and 150 here; start afresh (dskd train --restart)" in refused(
        mvtec_root, killed, "--steps", "150"
    )
    assert has_state(killed.with_name("tile.training")), "a refusal throws nothing away"
    continued, said = trained(mvtec_root, killed)
    whole, _ = trained(mvtec_root, tmp_path / "tile")
    (going_on,) = (line for line in said if line.startswith("going on after step"))
    done = int(going_on.split()[4])
    assert 1 <= done < STEPS, "the kill came in the middle"
    steps = [interval["step"] for interval in whole["history"]]
    assert len(steps) == 14 and steps[-1] == STEPS and done in steps
    told = [int(line.split("/")[0].removeprefix("step")) for line in said if line.startswith("step ")]
    assert told == steps[steps.index(done) + 1 :]
    assert curve(continued) == curve(whole)
    assert sha256_of(killed / WEIGHTS_FILE) == sha256_of(tmp_path / "tile" / WEIGHTS_FILE)
    assert read_record(killed) == read_record(tmp_path / "tile")
    assert sorted(path.name for path in killed.parent.iterdir()) == ["tile"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tile"]


def test_restart_throws_the_state_away(mvtec_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tile.training"
    folder.mkdir()
    (folder / STATE_FILE).write_bytes(b"broken")
    assert "is no readable training state" in refused(mvtec_root, tmp_path / "tile")
    document, said = trained(mvtec_root, tmp_path / "tile", "--restart", "--steps", "1")
    assert len(document["history"]) == 1 and not any("going on" in line for line in said)
    assert not folder.exists()


def test_a_training_that_fails_before_its_first_state_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too dark"), training_folder(tmp_path / "out") as folder:
        assert folder.is_dir()
        raise ValueError("too dark")
    assert list(tmp_path.iterdir()) == []


def test_one_that_fails_later_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), training_folder(tmp_path / "out") as folder:
        (folder / STATE_FILE).write_bytes(b"state")
        raise KeyboardInterrupt
    with training_folder(tmp_path / "out") as folder:
        assert has_state(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_folder_that_its_holder_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this process opening the lock file and locking it, the other one finishes."""
    lock = fcntl.flock
    tries: list[float] = []

    def flock(file: Any, how: int) -> None:
        if not tries:
            shutil.rmtree(tmp_path / "out.training")
        tries.append(time.monotonic())
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with training_folder(tmp_path / "out") as folder:
        assert len(tries) == 2
        with (folder / "lock").open() as other, pytest.raises(BlockingIOError):
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
