"""What a computer beside a production line needs: no module that only Linux has."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dskd.data import cache

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_POSIX = """
import os, sys, warnings
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import of it fails
del os.posix_fallocate
warnings.filterwarnings("ignore", "only soft file lock is available")  # Windows has a hard one
"""
TINY = [
    "--image-size", "32", "--backbone", "test_resnet", "--levels", "1", "2", "--level-weights", "1", "1",
    "--score-level-weights", "1", "1", "--embedding-depth", "1", "--epochs", "2", "--batch-size", "4",
    "--teacher-weights", "random", "--device", "cpu",
]  # fmt: skip


def python(body: str, *words: object, home: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + body, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=env | {"HOME": str(home), "USER": "line", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_imported_without_what_only_posix_has(tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "dskd").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert "dskd.data.cache" in names and "dskd.training.resume" in names
    assert python(f"import importlib\nfor name in {names}: importlib.import_module(name)\n", home=tmp_path) == ""


@pytest.mark.slow
def test_a_detector_is_trained_and_inspects_without_what_only_posix_has(tmp_path: Path) -> None:
    body = (
        "from pathlib import Path\nfrom dskd.cli.main import main\nfrom dskd.demo.dataset import draw_dataset\n"
        "home = Path(sys.argv[1])\n"
        "draw_dataset(home / 'data', categories=('flange',), num_train=8, num_test=4, image_size=64)\n"
        "main(['train', '--data', str(home / 'data'), '--out', str(home / 'detector'), '--checkpoint-seconds', '0',\n"
        "      *sys.argv[2:]])\n"
        "main(['predict', str(home / 'detector'), str(home / 'data/flange/test'), '--out', str(home / 'found')])\n"
        "assert 'fcntl' not in sys.modules or sys.modules['fcntl'] is None\n"
    )
    told = python(body, tmp_path, *TINY, home=tmp_path)
    assert len(told.splitlines()) == 4 == len((tmp_path / "found/predictions.jsonl").read_text().splitlines())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["data", "detector", "found"]
    assert list((tmp_path / ".cache/dskd").glob("*.npy")) and not list((tmp_path / ".cache/dskd").glob("*.partial"))


def test_without_fallocate_a_full_disk_is_still_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    array = cache.ArrayCache(tmp_path, 10**9).get("key", (3, 10**6), np.uint8, lambda array: array.__setitem__(2, 7))
    assert array.sum(axis=1, dtype=np.int64).tolist() == [0, 0, 7 * 10**6]
    (entry,) = tmp_path.glob("*.npy")
    if entry.stat().st_blocks:  # some file systems do not count them
        assert entry.stat().st_blocks * 512 >= 3 * 10**6
    opened = Path.open

    def full(self: Path, mode: str = "r", *rest: Any) -> Any:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *rest)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(cache.NoRoomError, match="no room for"):
        cache.ArrayCache(tmp_path, 10**9).get("other", (1000,), np.uint8, lambda array: pytest.fail("computed"))
