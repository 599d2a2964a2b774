"""Folders of killed processes do not pile up."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tune.study import scratch
from tune.study.scratch import scratch_folder

ROOT = Path(__file__).parents[1]
HOLDS = """
import time
from tune.study.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_YOUNG_SECONDS", 0.0)
    return tmp_path


def test_a_folder_is_gone_after_its_use(temporary: Path) -> None:
    with scratch_folder() as folder:
        (folder / "snapshot").write_text("")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_stays(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLDS]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert killed.is_dir() and alive.is_dir()
        time.sleep(0.01)
        with scratch_folder() as mine:
            assert {each for each in temporary.iterdir()} == {alive, mine}
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
