"""What continuous integration runs: installs nothing unasked, and agrees with the hooks of a commit."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of `.ci` beside the S3 server's scripts, and programs that write down how they are called."""
    shutil.copytree(ROOT / ".ci", tmp_path / "project" / ".ci")
    (tmp_path / "shared/s3").mkdir(parents=True)
    (tmp_path / "shared/s3/s3-up.sh").touch()
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "id", "env", "mktemp", "chmod", "rm", "cat"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    for name in ("apt-get", "sudo"):
        (tmp_path / "bin" / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{tmp_path}/calls\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return tmp_path


def run_servers(checkout: Path, ci: str) -> str:
    env = {"PATH": str(checkout / "bin"), "CI": ci, "TMPDIR": str(checkout)}
    command = [str(checkout / "bin/bash"), str(checkout / "project/.ci/servers")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("ci", ["", "false"])
def test_a_persons_machine_is_told_the_command_and_left_as_it_is(checkout: Path, ci: str) -> None:
    said = run_servers(checkout, ci)
    assert "apt-get install -y -qq --no-install-recommends" in said and "radosgw ceph-mon" in said
    assert said.splitlines()[-1].startswith("  sudo apt-get") == (os.geteuid() != 0)
    assert (checkout / "calls").read_text() == ""


def test_continuous_integration_installs_what_is_missing(checkout: Path) -> None:
    assert run_servers(checkout, "true") == ""
    calls = (checkout / "calls").read_text().splitlines()
    assert "apt-get update -qq" in calls[0] and "radosgw ceph-mon ceph-osd ceph-common curl" in calls[1]


def test_no_script_of_ci_writes_below_etc() -> None:
    for path in (ROOT / ".ci").iterdir():
        assert ">/etc" not in path.read_text().replace(" ", ""), path
