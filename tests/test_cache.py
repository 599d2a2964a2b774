import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dskd.data.cache import ArrayCache, NoRoomError, default_folder

MANY = 10**9


def ones(array: npt.NDArray[Any]) -> None:
    array[...] = 1


def never(array: npt.NDArray[Any]) -> None:
    raise AssertionError("the entry is there already")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def run_python(folder: Path, body: str) -> subprocess.Popen[str]:
    setup = (
        "import os, signal, sys, time, numpy as np\nfrom pathlib import Path\n"
        f"from dskd.data.cache import ArrayCache\ncache = ArrayCache(Path({str(folder)!r}), {MANY})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", setup + body], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_second_call_reads_what_the_first_wrote(tmp_path: Path) -> None:
    wanted = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    cache = ArrayCache(tmp_path, MANY)
    first = cache.get("key", (3, 4), np.float32, lambda array: np.copyto(array, wanted))
    second = ArrayCache(tmp_path, MANY).get("key", (3, 4), np.float32, never)
    for array in (first, second):
        np.testing.assert_array_equal(array, wanted)
        assert array.dtype == np.float32 and isinstance(array, np.memmap) and not array.flags.writeable


def test_key_shape_and_type_each_make_an_entry_of_their_own(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, MANY)
    filled: list[npt.NDArray[Any]] = []
    for key, shape, dtype in (
        ("a", (4,), np.uint8),
        ("b", (4,), np.uint8),
        ("a", (2, 2), np.uint8),
        ("a", (4,), np.int8),
    ):
        array = cache.get(key, shape, dtype, filled.append)
        assert array.shape == shape and array.dtype == dtype
    assert len(filled) == 4


def test_fill_starts_from_zeros(tmp_path: Path) -> None:
    for max_bytes in (MANY, 0):
        array = ArrayCache(tmp_path, max_bytes).get("k", (5,), np.int16, lambda array: array.__setitem__(0, 3))
        assert array.tolist() == [3, 0, 0, 0, 0]


def test_an_error_in_fill_leaves_nothing_and_reaches_the_caller(tmp_path: Path) -> None:
    def broken(array: npt.NDArray[Any]) -> None:
        ones(array)
        raise ValueError("this image is not readable")

    cache = ArrayCache(tmp_path, MANY)
    with pytest.raises(ValueError, match="not readable"):
        cache.get("key", (4,), np.uint8, broken)
    assert entries(tmp_path) == []
    assert cache.get("key", (4,), np.uint8, ones).tolist() == [1] * 4


@pytest.mark.parametrize("next_key", ["key", "another"])
def test_a_killed_process_leaves_no_entry_and_its_rest_is_swept(tmp_path: Path, next_key: str) -> None:
    kill = "cache.get('key', (1000,), np.uint8, lambda array: (array.fill(9), os.kill(os.getpid(), signal.SIGKILL)))"
    with run_python(tmp_path, kill) as process:
        assert process.wait(60) == -signal.SIGKILL
    (rest,) = entries(tmp_path)
    assert rest.suffix == ".partial", "the kill is expected in the middle of writing, or the test shows nothing"
    cache = ArrayCache(tmp_path, MANY)
    assert cache.get(next_key, (1000,), np.uint8, ones).tolist() == [1] * 1000
    assert not rest.exists()
    assert cache.get("key", (1000,), np.uint8, ones).tolist() == [1] * 1000


def test_several_processes_at_once_compute_once(tmp_path: Path) -> None:
    log = tmp_path / "fills"
    body = (
        f"def fill(array):\n    with open({str(log)!r}, 'a') as file: file.write('x')\n"
        "    time.sleep(0.3)\n    array[...] = 5\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "print(cache.get('key', (100,), np.uint8, fill).sum())\n"
    )
    processes = [run_python(tmp_path / "cache", body) for _ in range(4)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["500\n"] * 4
    assert log.read_text() == "x"


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 2400)  # two entries of 1000 bytes with their headers
    cache.get("a", (1000,), np.uint8, ones)
    (a,) = tmp_path.glob("*.npy")
    cache.get("b", (1000,), np.uint8, ones)
    (b,) = set(tmp_path.glob("*.npy")) - {a}
    os.utime(a, (1, 1))
    os.utime(b, (2, 2))
    cache.get("a", (1000,), np.uint8, never)
    third = cache.get("c", (1000,), np.uint8, ones)
    assert a.exists() and not b.exists()
    assert cache.get("a", (1000,), np.uint8, never).tolist() == third.tolist()


def test_an_array_in_use_survives_its_eviction(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1500)
    held = cache.get("a", (1000,), np.uint8, ones)
    cache.get("b", (1000,), np.uint8, ones)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert held.sum() == 1000


def test_an_array_larger_than_the_cache_is_computed_and_not_kept(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 1500)
    filled: list[npt.NDArray[Any]] = []
    kept = cache.get("small", (1000,), np.uint8, ones)
    for _ in range(2):
        assert cache.get("large", (2000,), np.uint8, filled.append).tolist() == [0] * 2000
    assert len(filled) == 2
    assert cache.get("small", (1000,), np.uint8, never).tolist() == kept.tolist()


@pytest.mark.parametrize("left", [0, 60, 1000])
def test_an_entry_cut_short_is_made_again(tmp_path: Path, left: int) -> None:
    cache = ArrayCache(tmp_path, MANY)
    cache.get("key", (1000,), np.uint8, ones)
    (entry,) = tmp_path.glob("*.npy")
    entry.write_bytes(entry.read_bytes()[:left])
    assert cache.get("key", (1000,), np.uint8, ones).tolist() == [1] * 1000
    assert np.load(entry).tolist() == [1] * 1000


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoRoomError, match=r"no room for 2 GB in the cache folder .*--cache-dir.*--cache-gb") as raised:
        ArrayCache(tmp_path, 3 * 10**9).get("key", (2 * 10**9,), np.uint8, never)
    assert "\n" not in str(raised.value) and "[Errno" not in str(raised.value)
    assert entries(tmp_path) == []


def test_on_a_full_disk_an_array_is_computed_in_memory_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reasons: list[str] = []
    cache = ArrayCache(tmp_path, MANY, reasons.append)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert cache.get("key", (1000,), np.uint8, ones).sum() == 1000
    assert len(reasons) == 1 and reasons[0].startswith("no room for ") and entries(tmp_path) == []
    cache.get("key", (1000,), np.uint8, ones)
    assert len(reasons) == 1 and len(entries(tmp_path)) == 1, "there is room again"


def test_the_default_folder_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dskd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache/dskd"
