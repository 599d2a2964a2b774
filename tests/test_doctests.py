"""The examples in the docstrings of dskd give what they say.

Not by pytest's --doctest-modules: it does not see functions that jaxtyping has wrapped to check their shapes
(conftest.py), and says nothing of it.
"""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text().count(">>> ")
    for path in sorted((ROOT / "dskd").rglob("*.py"))
    if ">>> " in path.read_text()
}


def found_in(module: ModuleType) -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False)
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for each, member in [(name, value), *(vars(value).items() if inspect.isclass(value) else [])]:
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if inspect.isroutine(member) or inspect.isclass(member):
                for test in finder.find(inspect.unwrap(member), each, module, globs=vars(module).copy()):
                    if test.examples:
                        yield test


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name: str) -> None:
    tests = list(found_in(importlib.import_module(name)))
    assert sum(len(test.examples) for test in tests) == WITH_EXAMPLES[name], "every example is found"
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_public_maths_has_examples() -> None:
    assert set(WITH_EXAMPLES) >= {
        f"dskd.{name}" for name in ("losses", "anomaly", "metrics", "calibration", "config", "presets")
    }
