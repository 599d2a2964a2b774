"""Credentials and control characters must reach no output, whatever form they are given in."""

import json
import logging
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tune import demo, pull, score, search, train
from tune.settings.entry import run_entry, say
from tune.settings.limits import MLFLOW_EXAMPLE, check_name, check_storage_address, resolved_server
from tune.settings.search import SearchSettings
from tune.storage.shown import HIDDEN, command, printable, shown, shown_url, without_secrets
from tune.study.progress import SearchProgress
from tune.tracking.client import check_server, first_line, tracking_ui_command
from tune.tracking.events import CategoryEnded, Event, Remarked, TrialEnded, TrialStarted
from tune.tracking.registry import check_category
from tune.tracking.tracker import Tracker

CANARY = "c4n4ry"
AT = "127.0.0.1:1"
FORMS = [
    # as they should be
    *(f"{scheme}://dskd:{CANARY}@{AT}/db" for scheme in ("postgresql", "postgresql+psycopg2", "mysql+pymysql")),
    f"mssql://dskd:{CANARY}@{AT}/db",
    *(f"{scheme}://dskd:{CANARY}@{AT}" for scheme in ("http", "https", "HTTPS", "s3", "ray", "databricks", "ftp")),
    f"postgres://dskd:{CANARY}@{AT}/db", f"http://{CANARY}@{AT}/", f"http://:{CANARY}@{AT}/",
    f"postgresql://dskd:{CANARY}@[::1]:1/db", f"postgresql://dskd:{CANARY}%40{CANARY}@{AT}/db",
    # in a query or a fragment
    f"postgresql://{AT}/db?password={CANARY}", f"postgresql://{AT}/db?user=dskd&password={CANARY}",
    f"postgresql://{AT}/db?sslmode=require&password={CANARY}#end", f"postgresql:///db?host={AT}&password={CANARY}",
    f"http://{AT}?token={CANARY}", f"http://{AT}/#{CANARY}", f"http://{AT}/path?x#{CANARY}",
    f"s3://bucket/path?secret_key={CANARY}", f"s3://key:{CANARY}@bucket/path?endpoint_override={AT}",
    # with what ends a part of an address
    f"postgresql://dskd:a/{CANARY}@{AT}/db", f"postgresql://dskd:a#{CANARY}@{AT}/db",
    f"postgresql://dskd:a?{CANARY}@{AT}/db", f"postgresql://dskd:a@{CANARY}@{AT}/db",
    f"postgresql://dskd:{CANARY}/@{AT}/db", f"postgresql://dskd:{CANARY}#@{AT}/db", f"postgresql://dskd:1/{CANARY}@{AT}",
    f"postgresql://dskd:1#{CANARY}@{AT}/db", f"postgresql://dskd:1?{CANARY}@{AT}/db", f"postgresql://d@{CANARY}:1@{AT}",
    f"postgresql://dskd:[{CANARY}@{AT}/db", f"postgresql://dskd:{CANARY}]@{AT}/db", f"http://dskd:a:{CANARY}@{AT}",
    f"postgresql://dskd:{CANARY} b@{AT}/db", f"postgresql://dskd:b {CANARY}@{AT}/db",
    f"postgresql://dskd:'{CANARY}@{AT}/db", f'postgresql://dskd:"{CANARY}@{AT}/db', f"postgresql://dskd:\\{CANARY}@{AT}",
    f"postgresql://dskd:<{CANARY}>@{AT}/db", f"postgresql://dskd:\t{CANARY}@{AT}/db",
    # mistyped
    f"postgresql:/dskd:{CANARY}@{AT}/db", f"postgresql:dskd:{CANARY}@{AT}/db", f"dskd:{CANARY}@{AT}/db",
    f"//dskd:{CANARY}@{AT}/db", f"postgresql://dskd:{CANARY}", f"postgresql://dskd:{CANARY}@", f" http://u:{CANARY}@{AT}",
    f"http://dskd:{CANARY}@host:port/db", f"http://dskd:{CANARY}@{AT}x", f"http:///dskd:{CANARY}@{AT}",
    f"post gresql://dskd:{CANARY}@{AT}/db",
]  # fmt: skip


def test_there_are_fifty_forms() -> None:
    assert len(set(FORMS)) >= 50 and all(CANARY in form for form in FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_an_address_shows_its_credentials_in_any_text(form: str) -> None:
    texts = [
        shown_url(form),
        without_secrets(form),
        shown(f"cannot parse URL from string {form!r}"),
        shown(f"cannot use {form}: no such host, tried http://127.0.0.1:5000 before"),
        first_line(RuntimeError(f"Max retries exceeded with url: {form}/api/2.0")),
        tracking_ui_command(form),
        json.dumps(shown(f"two: {form}, {form}")),
    ]
    assert not [text for text in texts if CANARY in text]


def test_what_is_no_secret_stays() -> None:
    for text in (
        "[Errno 2] No such file or directory: '/home/ann/data'",
        "MLflow at http://127.0.0.1:5000 does not answer: refused",
        "MLflow: http://mlflow:5000/#/experiments/3/runs/ab12",
        "models:/dskd-tile@champion cannot be downloaded from http://127.0.0.1:5000/path.",
        "state in s3://bucket/searches/parts, at 12:30",
        "sqlite:////srv/results/mlflow.db is locked",
    ):
        assert shown(text) == text
    assert shown_url(f"postgresql://dskd:{CANARY}@db:5432/optuna?sslmode=require") == "postgresql://db:5432/optuna"
    assert shown_url(f"postgresql:/dskd:{CANARY}@db") == HIDDEN


FLAGS = ["--tracking-uri", "--study-storage", "--storage", "--data", "--address"]
PROGRAMS = [search, train, pull, score, demo]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_command_repeats_credentials(
    program: ModuleType, flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command gets every form in one of its flags, and each flag every form; some commands know no such flag."""
    name = str(getattr(program, "__name__", "")).rpartition(".")[2]
    required = {
        "search": ["--data", str(tmp_path / "none")],
        "train": ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")],
        "pull": ["all", "--out", str(tmp_path / "out")],
        "score": [str(tmp_path / "none"), "--images", str(tmp_path / "none"), "--out", str(tmp_path / "out")],
        "demo": ["--out", str(tmp_path / "out"), "--trials", "0"],
    }[name]
    monkeypatch.chdir(tmp_path)  # what takes a form for a folder's name
    turn = PROGRAMS.index(program) + FLAGS.index(flag)
    for form in FORMS[turn % len(FLAGS) :: len(FLAGS)]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *required, f"{flag}={form}"])
        with pytest.raises(SystemExit) as end:
            program.main()
        said = capfd.readouterr()
        assert end.value.code == 2 and CANARY not in said.out + said.err, (form, said.err)


def test_no_error_of_a_client_repeats_credentials() -> None:
    """What passes the flags' checks reaches MLflow and its SQLAlchemy, whose errors repeat addresses."""
    num_passed = 0
    for form in FORMS:
        try:
            url = resolved_server(form, "--tracking-uri", MLFLOW_EXAMPLE)
        except ValueError as error:
            assert CANARY not in str(error)
            continue
        assert url is not None
        num_passed += 1
        with pytest.raises(ConnectionError) as raised:
            check_server(url)
        assert CANARY not in str(raised.value) and "\n" not in str(raised.value)
    assert num_passed > 8
    for form in FORMS:
        with pytest.raises(ValueError, match="folder or s3://BUCKET/PATH"):
            check_storage_address(form, "--storage")
    for folder in ("dskd-results", "/home/ann@work/x", "../a@b", "s3://bucket/a path"):
        check_storage_address(folder, "--storage")


def test_logs_of_every_library_are_shown_without_credentials(capfd: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        handler = logging.StreamHandler(sys.stderr)
        other = logging.getLogger("some.library")
        other.addHandler(handler)
        try:
            for form in FORMS:
                other.error("no answer from %s", form)
            try:
                raise RuntimeError(FORMS[0])
            except RuntimeError:
                other.exception("failed")
        finally:
            other.removeHandler(handler)
        raise RuntimeError(f"a bug with {FORMS[0]}")

    before = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit) as end:
            run_entry("search", act)
    finally:
        logging.setLogRecordFactory(before)
    said = capfd.readouterr().err
    assert end.value.code == 1 and CANARY not in said
    assert said.count("no answer from") >= len(FORMS) and "a bug with postgresql://127.0.0.1:1/db" in said


def test_neither_tags_nor_the_journal_hold_credentials(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    unsent, uri = tmp_path / "unsent.jsonl", f"sqlite:///{tmp_path}/mlflow.db"
    all_forms = "\n".join(FORMS)
    events: list[Event] = [
        TrialStarted("bolt", "one", {"learning_rate": 0.1}),
        Remarked("bolt", "one", all_forms),
        TrialEnded("bolt", "one", "failed", all_forms),
        CategoryEnded("bolt", "failed", {}, {"dskd.error": all_forms}),
    ]
    away = Tracker(f"http://{AT}", "parts", artifact_location=None, tags={}, unsent=unsent)
    for event in events:
        away.put(event)
    assert away.close(0.1) == len(events)
    assert CANARY not in unsent.read_text() and "127.0.0.1" in unsent.read_text()
    tracker = Tracker(uri, "parts", artifact_location=None, tags={}, unsent=unsent)
    assert tracker.close(60) == 0
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'parts'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2 and all(CANARY not in json.dumps(run.to_dictionary()) for run in runs)
    assert any("127.0.0.1" in run.data.tags.get("dskd.error", "") for run in runs)


FOREIGN = ["[red]", "[/]", "\x1b[31mred", "a\rb", "a\x00b", "a\u202eb", "[link=file:///etc/passwd]x[/link]", "\x9b2J"]


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_is_printed_as_it_is_with_control_characters_escaped(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"trial of {text}")
    SearchProgress(1).say(f"trial of {text}")
    said = capsys.readouterr().err
    assert said.count(f"trial of {printable(text)}\n") == 2
    assert all(letter == "\n" or letter.isprintable() for letter in said)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "a\\b",
        "a b",
        "..",
        ".a",
        "-a",
        "$(id)",
        "a;b",
        "a\nb",
        "a\x00b",
        "a'b",
        'a"b',
        "a`b",
        "[red]",
        "a" * 101,
    ],
)
def test_one_rule_for_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes a name of letters") as raised:
        check_name(name, "--name")
    assert str(raised.value).isprintable()
    refused: list[dict[str, Any]] = [{"name": name}, {"start_from": name}]
    for values in refused:
        if name.strip() or "name" in values:
            with pytest.raises(ValueError, match="takes a name of letters"):
                SearchSettings(data=str(tmp_path), **values)
    for good in ("parts", "2026-11", "größe_7", "v1.2", "_x"):
        check_name(good, "--name")


@pytest.mark.parametrize("category", ["a/b", "a:b", "a\nb", "a\x1bb", "a\u202eb", "-a", "'\""])
def test_a_category_that_no_command_can_name_is_refused(category: str) -> None:
    with pytest.raises(ValueError, match="rename its folder") as raised:
        check_category(category)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("word", ["a b", "$(id)", "a;b", "it's", "`id`", "[red]", "a\nb"])
def test_a_command_to_paste_is_one_line_that_means_these_words(word: str) -> None:
    line = command(["python", "tune/pull.py", word])
    assert "\n" not in line
    assert shlex.split(line) == ["python", "tune/pull.py", printable(word)]
