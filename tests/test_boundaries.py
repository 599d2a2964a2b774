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
ROOMS = {"jobs", "preflight", "runtime", "settings", "storage", "study", "tracking", "trial"}
ENTRIES = {"clean", "demo", "pull", "score", "search", "serve", "train", "versions"}
UNDOCUMENTED = ("ray.core.generated", "ray.train.v2", "ray.tune.execution")
"""Modules of Ray that it documents nowhere, although their names have no underscore."""
RAY_INTERNALS = "tune/runtime/ray_internals.py"
OTHER_PRIVATE_NAMES = {
    "dskd/arguments.py": {"_errors"},  # of tyro, which is held below the version that may move it
    "tune/jobs/stop.py": {"_exit"},  # of os, documented
    "tune/runtime/stopping.py": {"_exit"},
    "tune/settings/entry.py": {"_exit"},
}
"""Private names of others that a file uses outside of RAY_INTERNALS, each with its reason."""


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


def foreign_private_names(source: str) -> set[str]:
    """Private names that a file uses and does not define itself, also where it asks `getattr` for them."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}  # every NamedTuple has them, documented
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            used |= {str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant)}
    found = {name for name in used - own if name.startswith("_") and not name.startswith("__")}
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            private = [part for part in name.split(".") if part.startswith("_") and not part.startswith("__")]
            found.update(private if name not in sys.stdlib_module_names else [])
            found.update([name] if name.startswith(UNDOCUMENTED) else [])
    return found


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


def test_the_events_of_tracking_bring_in_no_mlflow() -> None:
    body = "import sys, tune.tracking.events\nprint(*{'mlflow', 'torch', 'ray', 'optuna'} & set(sys.modules))"
    assert in_a_fresh_interpreter(body) == ""


def test_tune_shows_its_entries_and_its_rooms() -> None:
    assert {path.stem for path in (ROOT / "tune").glob("*.py")} == {*ENTRIES, "__init__"}
    assert {path.parent.name for path in (ROOT / "tune").rglob("*.py")} == {*ROOMS, "tune"}


def test_the_library_shows_at_most_16_modules() -> None:
    """`__init__` and `__main__` count, folders do not."""
    assert len(list((ROOT / "dskd").glob("*.py"))) <= 16


def test_private_names_are_found() -> None:
    for source in (
        "import ray\nray._private.state",
        "from ray._private import state",
        "from ray.core.generated import gcs_pb2",
        "import ray.train.v2.api.config",
        "from ray.tune.execution import class_cache",
        "class Mine(Theirs):\n    def f(self): return self._theirs",
        "getattr(error, '_base', None)",
        "from tune.study.hooks import _revived",
    ):
        assert foreign_private_names(source), source
    assert not foreign_private_names("class Mine:\n    def f(self):\n        self._x = 1\n        return self._x")
    assert not foreign_private_names("import ray\nimport _thread\nray.init()\nrow._asdict()\n__name__")


def test_the_private_doors_of_ray_are_in_one_file() -> None:
    """And nobody uses any other private name that is not its file's own."""
    found = {
        str(path.relative_to(ROOT)): names
        for folder in ("dskd", "tune", "benchmarks")
        for path in modules(folder)
        if (names := foreign_private_names(path.read_text()))
    }
    assert found.pop(RAY_INTERNALS)
    assert found == OTHER_PRIVATE_NAMES


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
    assert dskd.PRESETS and dskd.__version__
    for name in set(dskd.__all__) - {"PRESETS", "__version__"}:
        assert getattr(dskd, name).__module__.startswith("dskd.")
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        dskd.Detektor  # noqa: B018


def test_the_package_itself_is_imported_without_torch() -> None:
    assert in_a_fresh_interpreter("import sys, dskd\nprint(*{'torch', 'numpy', 'PIL'} & set(sys.modules))") == ""
