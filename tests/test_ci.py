"""What continuous integration runs: installs nothing unasked, and agrees with the hooks of a commit."""

import importlib.resources
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dskd.cli.main import main
from dskd.demo.dataset import draw_dataset

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


def workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    return loaded


def problems(document: dict[Any, Any]) -> list[str]:
    """Of a GitHub workflow against its schema, and against what this project asks of one."""
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor"
    schema = json.loads((schemas / "github-workflows.json").read_text())
    written = {("on" if key is True else key): value for key, value in document.items()}  # YAML 1.1 reads `on` as true
    found = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(written)]
    if written.get("permissions") != {"contents": "read"}:
        found.append("more than reading is permitted")
    if not written.get("concurrency", {}).get("cancel-in-progress"):
        found.append("an outdated run goes on")
    for job in written["jobs"].values():
        if "timeout-minutes" not in job:
            found.append("a job may run for six hours")
        for step in job["steps"]:
            if "uses" in step and not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]):
                found.append(f"{step['uses']} may change under us: name a commit")
    return found


def test_the_workflow_is_valid_and_asks_for_little() -> None:
    assert problems(workflow()) == []


@pytest.mark.parametrize(
    "mistake",
    [
        {"permissions": "write-all"},
        {"concurrency": {"group": "ci"}},
        {
            "jobs": {
                "test": {"runs-on": "ubuntu-24.04", "timeout-minutes": 1, "steps": [{"uses": "actions/checkout@v4"}]}
            }
        },
        {"jobs": {"test": {"runs-on": "ubuntu-24.04", "steps": [{"run": ".ci/run"}]}}},
        {"jobs": {"test": {"timeout-minutes": 1, "steps": [{"run": ".ci/run"}]}}},
        {"job": {}},
    ],
)
def test_a_mistake_in_the_workflow_is_found(mistake: dict[str, Any]) -> None:
    assert problems(workflow() | mistake)


def test_the_workflow_calls_every_check_on_both_ends_of_the_supported_pythons() -> None:
    job = workflow()["jobs"]["everything"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"] and job["steps"][-1]["run"] == ".ci/run"


def test_the_oldest_and_the_newest_versions_are_tested_and_a_newer_ray_may_fail() -> None:
    jobs = workflow()["jobs"]
    assert jobs["versions"]["strategy"]["matrix"]["resolution"] == ["lowest-direct", "highest"]
    assert "continue-on-error" not in jobs["versions"] and jobs["next-ray"]["continue-on-error"] is True
    commands = [step["run"] for name in ("versions", "next-ray") for step in jobs[name]["steps"] if "run" in step]
    tests = [word for command in commands for word in command.split() if word.startswith("tests/")]
    assert len(tests) == 2 and all((ROOT / test).is_file() for test in tests)
    bounds = {
        name: line for line in _cluster_packages() for name in ("mlflow", "optuna", "ray") if line.startswith(name)
    }
    assert bounds.keys() == {"mlflow", "optuna", "ray"} and "~=" in bounds["ray"]
    assert all("<" not in bounds[name] for name in ("mlflow", "optuna")), "the newest is tested, so none is shut out"


def _cluster_packages() -> list[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["project"]["optional-dependencies"]["cluster"]
    return found


@pytest.mark.slow
def test_the_commands_for_other_systems_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here at least, on fewer and smaller images; the workflow runs them on Windows and macOS."""
    job = workflow()["jobs"]["elsewhere"]
    assert {name.partition("-")[0] for name in job["strategy"]["matrix"]["os"]} == {"windows", "macos"}
    install, draw, *commands = [step["run"] for step in job["steps"] if "run" in step]
    assert "cluster" not in install and draw == "python -m dskd demo-data drawn"
    monkeypatch.chdir(tmp_path)
    draw_dataset(Path("drawn"), categories=("flange",), num_train=12, num_test=6, image_size=64)
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "dskd"]
        main(words[3:])
    assert Path("detector.onnx").is_file() and list(Path("verdicts").rglob("*.webp"))


def test_a_commit_is_checked_as_the_quick_stage_checks() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [each["repo"] for each in hooks] == ["local"], "no network is needed"
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert all(hook["language"] == "system" and hook["always_run"] for hook in hooks[0]["hooks"])
    stage = re.search(r"^for check in ([a-z ]+); do step", (ROOT / ".ci/test").read_text(), re.MULTILINE)
    known = re.search(r"set -- ([a-z ]+); fi", (ROOT / ".ci/check").read_text())
    assert stage is not None and known is not None
    assert entries == [f".ci/check {name}" for name in stage[1].split()] and stage[1] == known[1]
