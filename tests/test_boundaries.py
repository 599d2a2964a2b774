import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dskd

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"ray", "mlflow", "optuna", "boto3", "pyarrow", "tune"}
"""What the library must never bring in."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which this test does not follow"
            yield str(node.module).partition(".")[0]


def in_a_fresh_interpreter(body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_every_module_of_the_library_brings_in_no_cluster() -> None:
    names = [module_name(path) for path in modules("dskd")]
    assert "dskd.show.overlays" in names and "dskd.data.cache" in names
    body = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        f"    if found := {FORBIDDEN} & set(sys.modules):\n"
        "        print(name, *sorted(found))\n"
        "        break\n"
    )
    assert in_a_fresh_interpreter(body) == ""


@pytest.mark.parametrize("path", modules("dskd"), ids=module_name)
def test_no_line_of_the_library_imports_the_cluster(path: Path) -> None:
    assert not FORBIDDEN & set(imports(path))


def test_the_application_does_not_go_through_the_command_line() -> None:
    for path in modules("tune"):
        assert "dskd.cli" not in path.read_text(), path


def test_only_the_tracking_folder_imports_mlflow() -> None:
    found = {path.parent for path in modules("tune") if "mlflow" in imports(path)}
    assert found == {ROOT / "tune" / "tracking"}


def test_modules_of_tune_shadow_nothing() -> None:
    """`python tune/search.py` puts tune/ itself first on the path, where `import mlflow` would find tune/mlflow.py."""
    direct = [*(ROOT / "tune").glob("*.py"), *(path.parent for path in (ROOT / "tune").glob("*/__init__.py"))]
    ours = {path.stem for path in direct} - {"__init__"}
    assert not ours & set(sys.stdlib_module_names)
    assert not ours & set(importlib.metadata.packages_distributions())
    assert [name for name in sorted(ours) if importlib.util.find_spec(name)] == []


def test_the_cluster_folder_holds_no_python() -> None:
    assert list((ROOT / "cluster").rglob("*.py")) == []


def test_the_leaves_do_not_know_each_other() -> None:
    leaves = {
        "losses": "anomaly metrics data",
        "anomaly": "losses metrics data",
        "metrics": "losses anomaly data model",
    }
    for leaf, others in leaves.items():
        tree = ast.walk(ast.parse((ROOT / "dskd" / f"{leaf}.py").read_text()))
        known = {str(node.module) for node in tree if isinstance(node, ast.ImportFrom)}
        assert not [name for name in known for other in others.split() if name.startswith(f"dskd.{other}")]


def test_public_names_exist_and_are_all_there_is() -> None:
    assert len(set(dskd.__all__)) == len(dskd.__all__)
    for name in dskd.__all__:
        assert getattr(dskd, name).__module__.startswith("dskd.") if name != "PRESETS" else dskd.PRESETS
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        dskd.Detektor  # noqa: B018


def test_the_package_itself_is_imported_without_torch() -> None:
    assert in_a_fresh_interpreter("import sys, dskd\nprint(*{'torch', 'numpy', 'PIL'} & set(sys.modules))") == ""
