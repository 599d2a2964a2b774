"""Every README: its sections, links, fences and paths in the quick stage; its blocks, run, in the slow one.

sybil finds the blocks and the skips, which carry their reason in the document; markdown-it tells links, headings
and fences apart. Blocks run in order in a folder of their own, on small drawn data, with a teacher of random
weights where the hub's cache would have the real ones, and with the commands' numbers made small (`SMALLER`).
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import SkipTest
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from test_report import report_of

from dskd.cli.examples import EXAMPLES
from dskd.report.document import to_json

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
MAX_LINES = 150
"""Of the root's README: a reader has the whole of it in view."""

SECTIONS: dict[str, tuple[str, ...]] = {
    README: (
        "Start",
        "Your own images in ten minutes",
        "Many products: the search",
        "The same on a cluster",
        "Results",
        "Where to read on",
    ),
    "dskd/README.md": (
        "Commands",
        "Methods",
        "Length",
        "Terms",
        "Data",
        "Validation and thresholds",
        "ONNX",
        "Python",
        "Limits",
        "Design notes",
    ),
    "tune/README.md": (
        "Search",
        "The space",
        "What chooses",
        "Continue, limit, repeat",
        "MLflow",
        "Pull",
        "Serve",
        "Train one configuration",
        "Inspect many images",
        "Limits",
        "Design notes",
    ),
    "cluster/README.md": (
        "What it costs",
        "The image",
        "A team server on one machine",
        "AWS",
        "Kubernetes",
        "Who can do what",
        "What has been tried",
    ),
    "benchmarks/README.md": (
        "The main job on real images",
        "Eight trials each: what searching gains",
        "Killed at random",
        "The four presets, and DSKD against its parts",
        "Metrics",
        "Export and overhead",
        "A search against plain Ray Tune",
        "What these figures do not show",
    ),
    ".github/CONTRIBUTING.md": ("Four commands", "How the house is laid", "Dependencies"),
}
"""What each document must have; in README in this order."""

SMALLER: dict[str, tuple[str, ...]] = {
    "dskd train": ("--steps", "1", "--image-size", "64", "--batch-size", "4"),
    "tune/search.py": (
        *("--steps", "1", "--image-size", "64", "--batch-size", "4", "--trials", "2"),
        *("--score-candidates", "20", "--categories", "flange"),
    ),
    "tune/train.py": ("--steps", "1", "--image-size", "64", "--batch-size", "4"),
    "tune/demo.py": ("--steps", "1", "--image-size", "64", "--batch-size", "4", "--trials", "2"),
    "benchmarks/export.py": ("--repeats", "1", "--image-size", "64", "--presets", "stfpm"),
    "benchmarks/overhead.py": (
        "--repeats",
        "1",
        "--image-size",
        "64",
        "--num-images",
        "8",
        "--batch-size",
        "4",
        "--presets",
        "stfpm",
    ),
}
"""Flags that a command of a document is given behind its own, where the last one counts."""

LANGUAGES = {"bash", "python", "text", "toml", "json"}
"""Of blocks; the first two are run."""


class Problem(NamedTuple):
    line: int
    text: str


Check = Callable[[str, str], list[Problem]]
"""Finds what is wrong with a document of this name and this text."""


def tokens_of(text: str) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(text)


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str) -> list[tuple[int, str]]:
    """Level and words of each heading."""
    tokens = tokens_of(text)
    return [
        (int(token.tag[1:]), "".join(part.content for part in tokens[index + 1].children or ()))
        for index, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def check_sections(name: str, text: str) -> list[Problem]:
    found = [words for level, words in headings(text) if level == 2]
    missing = [Problem(1, f"has no section {section!r}") for section in SECTIONS[name] if section not in found]
    order = [section for section in found if section in SECTIONS[name]]
    if not missing and name == README and order != list(SECTIONS[name]):
        return [Problem(1, f"has its sections in the order {order}")]
    return missing


def check_length(name: str, text: str) -> list[Problem]:
    count = len(text.splitlines())
    return [Problem(count, f"has {count} lines, at most {MAX_LINES}")] if name == README and count > MAX_LINES else []


def check_fences(name: str, text: str) -> list[Problem]:
    """Each fence is closed and says its language; no block is made by mere indentation."""
    lines = text.splitlines()
    problems = []
    for token in tokens_of(text):
        if token.type == "fence" and token.map is not None:
            first, end = token.map
            if not lines[end - 1].strip().startswith(token.markup) or end - 1 == first:
                problems.append(Problem(first + 1, "a fence that is never closed"))
            if re.search(r"^\s*```\w", token.content, re.MULTILINE):
                problems.append(Problem(first + 1, "a fence that swallows the next one"))
            if token.info.strip() not in LANGUAGES:
                problems.append(Problem(first + 1, f"a block of the language {token.info.strip()!r}"))
        elif token.type == "code_block" and token.map is not None:
            problems.append(Problem(token.map[0] + 1, "an indented block: fence it and say its language"))
    return problems


def check_markup(name: str, text: str) -> list[Problem]:
    """Bold words, code and brackets that are opened are closed too, within their paragraph or cell."""
    problems = []
    for token in tokens_of(text):
        if token.type != "inline" or token.map is None:
            continue
        plain = "".join(child.content for child in token.children or () if child.type == "text")
        problems += [
            Problem(token.map[0] + 1, f"{mark} is opened and never closed: {plain[:60]!r}")
            for mark in ("**", "`", "](")
            if mark in plain
        ]
    return problems


def check_sentences(name: str, text: str) -> list[Problem]:
    """A paragraph ends as a sentence does, and a comment or bracket that it opens is closed."""
    problems = []
    tokens = tokens_of(text)
    for index, token in enumerate(tokens):
        if token.type == "html_block" and token.content.count("<!--") != token.content.count("-->"):
            problems.append(Problem((token.map or [0])[0] + 1, "a comment that is never closed"))
        if token.type != "paragraph_open" or token.map is None:
            continue
        written = tokens[index + 1].content.rstrip()
        words = "".join(child.content for child in tokens[index + 1].children or ()).rstrip(" *_")
        is_item = token.hidden or token.level > 0
        if written.startswith("!["):
            continue
        if not is_item and not re.search(r"[.:!?…)\]]$", words):
            problems.append(Problem(token.map[1], f"a paragraph that ends in mid-sentence: …{words[-40:]!r}"))
        if words.count("(") != words.count(")"):
            problems.append(Problem(token.map[1], f"brackets that do not match: …{words[-40:]!r}"))
    return problems


def links(text: str) -> Iterator[tuple[int, str]]:
    for token in tokens_of(text):
        for child in token.children or ():
            target = child.attrs.get("href" if child.type == "link_open" else "src")
            if child.type in ("link_open", "image") and target is not None:
                yield (token.map or [0])[0] + 1, unquote(str(target))


def check_links(name: str, text: str) -> list[Problem]:
    """Relative links lead to what is there, and anchors to a heading."""
    problems = []
    for line, target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (ROOT / name).parent / file if file else ROOT / name
        if not place.exists():
            problems.append(Problem(line, f"a link to {target}, which does not exist"))
        elif anchor and anchor not in {slug(words) for _, words in headings(text if not file else place.read_text())}:
            problems.append(Problem(line, f"a link to {target}, where no heading is {anchor}"))
    return problems


def check_paths(name: str, text: str) -> list[Problem]:
    """A path that begins with a folder of the checkout names a file or folder that is there."""
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name in _OURS)
    found = re.finditer(rf"(?<![\w/.~-])((?:{tops})/[\w./-]*[\w/])(?![\w*<…(])", text)
    return [
        Problem(text.count("\n", 0, match.start()) + 1, f"names {match[1]}, which does not exist")
        for match in found
        if not (ROOT / match[1]).exists() and not re.search(r"/(?:X|test_)$|/X\.py$", match[1])
    ]


_OURS = {"dskd", "tune", "cluster", "benchmarks", "tests", ".ci", ".github"}


def check_skips(name: str, text: str) -> list[Problem]:
    """A block that is not run says why, and says it right above the block."""
    problems = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip().startswith("<!-- skip"):
            continue
        if not re.fullmatch(r'\s*<!-- skip: next "[^"]{10,}" -->', line):
            problems.append(Problem(number, 'a skip without a reason; write <!-- skip: next "needs …" -->'))
        elif number == len(lines) or not re.match(r"\s*```(bash|python)$", lines[number]):
            problems.append(Problem(number, "a skip with no block below it"))
    return problems


CHECKS: tuple[Check, ...] = (
    check_sections,
    check_length,
    check_fences,
    check_markup,
    check_sentences,
    check_links,
    check_paths,
    check_skips,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SECTIONS)
def test_document_has_no_problem(name: str, check: Check) -> None:
    found = check(name, (ROOT / name).read_text())
    assert not found, "\n".join(f"{name}:{line} {text}" for line, text in found)


def test_every_document_is_checked() -> None:
    folders = (ROOT, *(path for path in ROOT.iterdir() if path.is_dir() and path.name in _OURS))
    found = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.md") if folder != ROOT}
    assert found | {path.name for path in ROOT.glob("*.md")} == set(SECTIONS)


def test_first_command_comes_early() -> None:
    lines = (ROOT / README).read_text().splitlines()
    assert lines.index("```bash") < 30


@pytest.mark.parametrize(
    ("name", "right", "wrong", "check"),
    [
        (README, "\n## Results\n", "\n## Figures\n", check_sections),
        (README, "\n## Results\n", "\n" * 120 + "## Results\n", check_length),
        (README, "```\n\n## The same", "\n\n## The same", check_fences),
        (README, "```bash", "```", check_fences),
        ("tune/README.md", "**Free trials**", "**Free trials", check_markup),
        (README, "`--dry-run` checks everything and", "`--dry-run checks everything and", check_markup),
        (README, "[cluster/README.md](cluster/README.md)", "[cluster/README.md](cluster/READ.md)", check_links),
        (README, "dskd/README.md#data", "dskd/README.md#datum", check_links),
        (README, ".github/pictures/verdicts.webp", ".github/pictures/verdict.webp", check_links),
        ("tune/README.md", "tune/pull.py all", "tune/fetch.py all", check_paths),
        (README, '<!-- skip: next "needs a Ray', '<!-- skip: next --> <!-- "needs a Ray', check_skips),
        ("tune/README.md", 'next "a server that runs until it is stopped"', "next", check_skips),
    ],
)
def test_mistake_is_found(name: str, right: str, wrong: str, check: Check) -> None:
    text = (ROOT / name).read_text()
    assert right in text
    assert not check(name, text) and check(name, text.replace(right, wrong, 1))


@pytest.mark.parametrize("name", SECTIONS)
def test_a_document_cut_in_the_middle_of_a_sentence_is_found(name: str) -> None:
    """As commit c0f811b cut README: a middle part gone, and two halves of sentences joined."""
    text = (ROOT / name).read_text()
    middle = text.index(" ", text.index("\n\n", len(text) // 3) + 40)
    shortened = text[:middle] + text[text.index(" ", 2 * len(text) // 3) :]
    assert any(check(name, shortened) for check in CHECKS)
    truncated = text[:middle]
    assert any(check(name, truncated) for check in CHECKS)


def document_of(name: str, evaluate: Callable[[Example], str | None]) -> Document:
    """The blocks of a document, each a step, and its skips."""
    parsers: list[Any] = [SkipParser(), *(CodeBlockParser(language, evaluate) for language in ("bash", "python"))]
    return Document.parse(str(ROOT / name), *parsers)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache, with an untrained teacher where the pretrained one would be: no command has to name it."""
    import safetensors.torch
    import timm
    import torch

    cache = tmp_path_factory.mktemp("hub")
    source = timm.get_pretrained_cfg("resnet18.tv_in1k")
    assert source is not None and source.hf_hub_id
    folder = cache / f"models--{source.hf_hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        state = timm.create_model("resnet18", pretrained=False).state_dict()
    safetensors.torch.save_file(dict(state), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return cache


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dskd.demo.dataset import draw_dataset

    root = tmp_path_factory.mktemp("documents") / "my-images"
    draw_dataset(root, num_train=24, num_test=4, image_size=64)
    return root


@pytest.fixture
def desk(tmp_path: Path, weights: Path, drawn: Path, detector_folder: Path) -> tuple[Path, dict[str, str]]:
    """A folder where a reader could stand, and the environment in which the commands of a document run."""
    for name in ("dskd", "tune", "benchmarks", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(drawn, tmp_path / "my-images")
    shutil.copytree(detector_folder, tmp_path / "detectors" / "flange")
    shutil.copy(drawn / "flange" / "test" / "good" / "000.png", tmp_path / "part.png")
    (tmp_path / "dskd-results" / "parts").mkdir(parents=True)
    (tmp_path / "dskd-results" / "parts" / "report.json").write_bytes(to_json(report_of(2)))
    shims = tmp_path / ".venv" / "bin"
    shims.mkdir(parents=True)
    for name in ("dskd", "python"):
        shims.joinpath(name).write_text(_shim(name))
        shims.joinpath(name).chmod(stat.S_IRWXU)
    (shims / "activate").write_text("")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DSKD_"))}
    env |= {
        "PATH": os.pathsep.join((str(shims), str(Path(sys.executable).parent), env["PATH"])),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(weights),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return tmp_path, env


def _shim(name: str) -> str:
    """A command that does what it is told to, on a smaller scale."""
    real = f'"{sys.executable}"' if name == "python" else f'"{sys.executable}" -m dskd'
    cases = [
        f'{word}) set -- "$@" {" ".join(more)} ;;'
        for command, more in SMALLER.items()
        for program, _, word in [command.rpartition(" ")]
        if (program or "python") == name
    ]
    drawn_already = '[ "$1" = demo-data ] && [ -d "$2" ] && exit 0\n' if name == "dskd" else ""
    print_only = 'case " $* " in *" --print-config "*) exec ' + real + ' "$@" ;; esac\n'
    return f'#!/bin/sh\n{drawn_already}{print_only}case "$1" in\n' + "\n".join(cases) + f'\nesac\nexec {real} "$@"\n'


@pytest.mark.cluster
@pytest.mark.parametrize("name", SECTIONS)
def test_blocks_run(name: str, desk: tuple[Path, dict[str, str]]) -> None:
    folder, env = desk
    ran: list[int] = []

    def run(example: Example) -> str | None:
        language, text = example.region.lexemes["arguments"], str(example.parsed)
        words = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else ["python", "-c", text]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)
        ran.append(example.line)
        if done.returncode:
            return f"{name}:{example.line} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return None

    reasons = []
    for example in document_of(name, run).examples():
        try:
            example.evaluate()
        except SkipTest as skip:
            reasons.append(f"{name}:{example.line} not run: {skip}")
    if not ran:
        pytest.skip("; ".join(reasons))


@pytest.mark.cluster
def test_examples_of_the_help_run(desk: tuple[Path, dict[str, str]]) -> None:
    """Those of the library as its help prints them, in one folder, in the order of the commands."""
    folder, env = desk
    shutil.copytree(folder / "detectors" / "flange", folder / "detectors" / "fabric")
    for command in EXAMPLES:
        help_words = ["dskd", command, "--help"]
        shown = subprocess.run(help_words, env=env, cwd=folder, capture_output=True, text=True, check=True)
        examples = [line.strip() for line in shown.stdout.partition("examples:\n")[2].splitlines()]
        assert examples == list(EXAMPLES[command])
        for example in examples:
            if command == "page":
                _check_that_it_serves(example, folder, env)
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", example], cwd=folder, env=env, capture_output=True, text=True,
                timeout=600, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{example}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _check_that_it_serves(example: str, folder: Path, env: dict[str, str]) -> None:
    """Until it says where; it would run until it is stopped."""
    process = subprocess.Popen(
        example.split(), cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process, process.stderr as lines:
        try:
            said = []
            for line in lines:
                said.append(line)
                if "the page: http://127.0.0.1:" in line:
                    return
            raise AssertionError("".join(said))
        finally:
            process.terminate()
