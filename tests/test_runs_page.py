"""What a person sees of a search in MLflow's pages, in a browser that was never there before."""

import base64
import importlib.util
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from services import mlflow_server
from test_report import report_of

from dskd.checkpoint import read_record
from dskd.report.render import render
from tune.study.categories import threshold_figures
from tune.tracking.events import CategoryEnded, EpochDone, TrialEnded, TrialStarted
from tune.tracking.runs_page import experiment_note, how_to_open, run_name, view_tag
from tune.tracking.tracker import Delivered, Tracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_a_run_is_named_so_that_a_person_can_say_it() -> None:
    assert run_name("flange", "a1", 2, "rd4ad with hkd_weight 1") == "flange 02 · hkd_weight 1"
    assert run_name("flange", "a1", 1, "rd4ad untuned") == "flange 01 · rd4ad untuned"
    assert run_name("flange", "a1-fold-1", 0, "") == "flange-a1-fold-1"
    long = run_name("flange", "a1", 12, f"dskd with {', '.join(f'some_name_{n} 0.5' for n in range(9))}")
    assert len(long) < 80 and long.startswith("flange 12 · some_name_0 0.5, ") and long.endswith(" …")


def test_the_saved_view_is_what_mlflow_reads() -> None:
    view = json.loads(view_tag(now=2.0))
    kind, _, text = view["state"].partition(";")
    state = json.loads(zlib.decompress(base64.b64decode(text)))
    assert kind == "deflate" and view["createdAt"] == 2000
    assert "metrics.`test/image_auroc`" in state["selectedColumns"]


def test_a_link_holds_no_password_and_a_file_is_told_how_to_be_served() -> None:
    link = how_to_open("https://me:secret@host:5000/", "3")
    assert link.startswith("https://host:5000/#/experiments/3/runs?viewStateShareKey=dskd&")
    assert how_to_open("sqlite:////tmp/m.db", "3").startswith("mlflow ui --backend-store-uri sqlite:////tmp/m.db")


def test_caveats_stand_first_in_the_experiments_note() -> None:
    assert experiment_note("parts", "data", "val", is_untrained=True).startswith("> **The teacher is untrained")
    assert experiment_note("parts", "data", "oracle", is_untrained=False).startswith("> **Selected on the test images")
    assert experiment_note("parts", "data", "val", is_untrained=False).startswith("Search *parts*")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, detector_folder: Path) -> Iterator[tuple[str, Tracker]]:
    """A server with a search of two categories, each with a pruned trial and a champion that is delivered."""
    root = tmp_path_factory.mktemp("pages")
    with mlflow_server(root, backend_uri=f"sqlite:///{root}/mlflow.db", artifact_root=str(root / "artifacts")) as url:
        tracker = Tracker(
            url, "parts", artifact_location=None, tags={"dskd.selection": "val", "dskd.search": "parts"},
            unsent=root / "unsent.jsonl", about=experiment_note("parts", "data", "val", is_untrained=False),
        )  # fmt: skip
        record = read_record(detector_folder)
        for category in ("bolt", "tile"):
            params = record.config.flat() | {"preset": "dskd"}
            for number, (trial, end) in enumerate((("a", "finished"), ("b", "pruned")), 1):
                role, tried = ("preset", "dskd untuned") if number == 1 else ("trial", "dskd with hkd_weight 1")
                tracker.put(TrialStarted(category, trial, params, number, tried, role))  # type: ignore[arg-type]
                tracker.put(EpochDone(category, trial, 1, {"val/best_objective": 0.9 / number}, 1000))
                tracker.put(TrialEnded(category, trial, end, ""))  # type: ignore[arg-type]
            figures = {"val/objective": 0.9, "test/image_auroc": 0.8765, **threshold_figures(record)}
            delivered = Delivered(record.config.flat(), "dskd with blur_sigma 2", f"Champion of **{category}**")
            tracker.register_champion(category, "a", detector_folder, figures, "data", 60, delivered=delivered)
            tracker.put(CategoryEnded(category, "finished", {}, {"mlflow.note.content": f"**{category}**"}))
        yield url, tracker
        assert tracker.close(60) == 0


def _wait_for_events(client: MlflowClient) -> None:
    """Until the second category has ended; what registers a champion does not wait for the events before it."""
    while not any("mlflow.note.content" in run.data.tags for run in client.search_runs(["1"], "run_name = 'tile'")):
        time.sleep(0.2)


@pytest.mark.services
def test_the_champions_run_has_the_delivered_values_and_no_metric_stands_twice(
    searched: tuple[str, Tracker], detector_folder: Path
) -> None:
    url, tracker = searched
    assert how_to_open(url, "1") == tracker.page(60)
    client = MlflowClient(tracking_uri=url)
    _wait_for_events(client)
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    names = ("", " 01 · dskd untuned ★", " 02 · hkd_weight 1")
    assert set(runs) == {f"{category}{name}" for category in ("bolt", "tile") for name in names}
    champion, pruned, parent = runs["bolt 01 · dskd untuned ★"], runs["bolt 02 · hkd_weight 1"], runs["bolt"]
    record = read_record(detector_folder)
    told = {name: text for name, text in champion.data.params.items() if name.startswith("delivered.")}
    assert told == {f"delivered.{name}": str(value) for name, value in record.config.flat().items()}
    assert champion.data.metrics["threshold/value"] == record.threshold(0.01).value
    assert champion.data.tags["dskd.role"] == "champion" and pruned.data.tags["dskd.role"] == "trial"
    assert (pruned.info.status, pruned.data.tags["dskd.status"]) == ("FINISHED", "pruned")
    assert not parent.data.metrics, "its champion's"
    about = str(client.get_model_version("dskd-bolt", "1").description)
    assert champion.info.run_id in about and "mlflow models serve -m models:/dskd-bolt@champion" in about


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_the_link_shows_the_champions_in_a_browser_that_was_never_there(
    searched: tuple[str, Tracker], detector_folder: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import expect, sync_playwright

    _, tracker = searched
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 3600, "height": 1000})
        page.goto(tracker.page(60))
        expect(page.get_by_text("bolt 01 · dskd untuned ★").first).to_be_visible(timeout=60_000)
        page.screenshot(path=tmp_path / "runs.png")
        text = page.locator("body").inner_text()
        browser.close()
    weights = str(read_record(detector_folder).config.score.score_level_weights)
    columns = ("test/image_auroc", "threshold/guaranteed_rate", "delivered.blur_sigma")
    for wanted in (*columns, "0.8765", weights, "dskd with blur_sigma 2", "pruned"):
        assert wanted in text, wanted


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_the_report_opens_within_mlflow_s_page(searched: tuple[str, Tracker], tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    url, tracker = searched
    report = report_of(2)
    (tmp_path / "report.html").write_text(render(report), encoding="utf-8")
    tracker.add_report(["bolt"], tmp_path / "report.html", 60)
    client = MlflowClient(tracking_uri=url)
    (parent,) = client.search_runs(["1"], "run_name = 'bolt'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(f"{url}/#/experiments/1/runs/{parent.info.run_id}/artifacts/report/report.html")
        inside = page.frame_locator("iframe#html")
        expect(inside.locator("h1")).to_contain_text(report.name, timeout=60_000)
        slider, counts = inside.locator("input[type=range]").first, inside.locator("output.counts").first
        before = counts.inner_text()
        slider.press("Home")
        expect(counts).not_to_have_text(before)
        page.screenshot(path=tmp_path / "report.png")
        browser.close()
