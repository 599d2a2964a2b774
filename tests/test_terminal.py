"""What people see on a terminal of 80 columns: whole words, and no line that the terminal itself has to break."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 80


def on_terminal(*words: object, folder: Path) -> list[str]:
    """The lines that a command shows on a pseudo-terminal, without colours and cursor movements."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    token = folder / "token"
    token.write_text("0" * 64)  # Ray would otherwise write one into the home folder
    token.chmod(0o600)
    env |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN_PATH": str(token)}
    process = subprocess.Popen(
        [str(word) for word in words], cwd=folder, env=env, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # Linux's end of a pseudo-terminal
            break
        if not part:
            break
        shown += part
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait() == 0, text
    return [line for part in text.split("\n") for line in part.split("\r")]


def check_widths(lines: list[str]) -> None:
    """Only a single word, such as a path, may be wider than the terminal."""
    assert [line for line in lines if len(line) > COLUMNS and len(line.split()) > 1] == []


def test_predict_and_evaluate_break_no_word(detector_folder: Path, mvtec_root: Path, tmp_path: Path) -> None:
    images = tmp_path / ("a-folder-with-quite-a-long-name-" * 2) / "scratch"
    images.mkdir(parents=True)
    (images / "000.png").write_bytes((mvtec_root / "tile/test/scratch/000.png").read_bytes())
    dskd = (sys.executable, "-m", "dskd")
    seen = on_terminal(*dskd, "predict", detector_folder, images, "--out", tmp_path / "out", folder=tmp_path)
    check_widths(seen)
    assert str(images / "000.png") in " ".join(seen).split(), "a path stays whole, and can be copied"
    told = on_terminal(*dskd, "evaluate", detector_folder, "--data", mvtec_root, folder=tmp_path)
    check_widths(told)
    assert any(re.fullmatch(r"scratch +\d of 4 \(\d+%\)", line) for line in told)


@pytest.mark.cluster
def test_search_and_pull_break_no_word(mvtec_root: Path, cluster_folder: Path) -> None:
    category = "hazelnut-of-the-second-supplier"
    data = cluster_folder / "data"
    data.mkdir()
    (data / category).symlink_to(mvtec_root / "tile")
    tiny = ("--steps", "4", "--image-size", "32", "--batch-size", "4", "--score-candidates", "4", "--backbone",
            "test_resnet", "--levels", "1", "2", "--teacher-weights", "random", "--storage", "results",
            "--folds", "0")  # fmt: skip
    search = (sys.executable, ROOT / "tune/search.py", "--data", "data", "--name", "parts", *tiny)
    first = on_terminal(*search, "--trials", "2", folder=cluster_folder)
    again = on_terminal(*search, "--trials", "3", folder=cluster_folder)
    pulled = on_terminal(
        *(sys.executable, ROOT / "tune/pull.py", "all", "--name", "parts", "--storage", "results"),
        *("--out", "detectors"), folder=cluster_folder,
    )  # fmt: skip
    for lines in (first, again, pulled):
        check_widths(lines)
        assert any(line.split()[:1] == [category] for line in lines), "the name of a category is never folded"
        assert not any("mlflow.store" in line or "authentication" in line for line in lines)
    said = " ".join(" ".join(again).split())
    assert re.search(rf"{category}: continues: 2 of 3 ended, best \d\.\d{{4}}", said), again
    assert "trial 3 of 3" in said and "trial 1 of 3" not in said and "trial 2 of 3" not in said
    assert any(line.split() == ["folder", f"detectors/{category}"] for line in pulled)
