"""Folders of killed processes do not pile up."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tune.storage import temporary as module
from tune.storage.temporary import temporary_folder

ROOT = Path(__file__).parents[1]
HOLDS = """
import time
from tune.storage.temporary import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module._remove_left.cache_clear()  # a process looks once
    return tmp_path


def test_a_folder_is_gone_after_its_use(temporary: Path) -> None:
    with temporary_folder() as folder:
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
        with temporary_folder() as mine:
            assert {each for each in temporary.iterdir()} == {alive, mine}
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
