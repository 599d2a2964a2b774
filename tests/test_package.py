"""What a submitted job takes along: the code, and nothing of what is made beside it."""

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[1]
MADE = [
    "detectors/flange/model.safetensors", "champions/flange/detector.json", "registered/tile/model.safetensors",
    "verdicts/overlays/a.png", "reports/report.html", "scored/verdicts/part-0.parquet", "dskd-results/mlflow.db",
    "dskd-demo/data/flange/a.png", "data/flange/train/good/a.png", "my-images/a.png", "mlruns/1/meta.yaml",
    ".venv/bin/python", ".git/HEAD", ".dskd/compose.env", "detector.onnx", "notes.txt", "x/a.png",
    "tune/__pycache__/search.pyc",
]  # fmt: skip


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the package of a checkout in which people have worked."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in (".rayignore", ".gitignore", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    for folder in ("dskd", "tune", "cluster", "benchmarks", ".ci"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for name in (*MADE, "space.toml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("made by hand")
    package = checkout.with_name("package.zip")
    create_package(str(checkout), package, include_gitignore=True)
    return set(zipfile.ZipFile(package).namelist())


def test_the_package_of_a_job_holds_the_code_and_files_beside_it_that_flags_name(packaged: set[str]) -> None:
    needed = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dskd", "tune")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == needed | {"pyproject.toml", "space.toml"}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_beside_the_code_stays(name: str, packaged: set[str]) -> None:
    assert name not in packaged
