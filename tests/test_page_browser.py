"""The inspector's page in a real browser, over the real server: from a dropped photo to the new threshold."""

import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dskd.checkpoint import read_record
from dskd.detector import Detector
from dskd.jobs.feedback import Quarantine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed: .ci/setup dev"),
]
EVIL = "<img src=x onerror=alert(1)>.png"
DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const [name, text] of files) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
  }
  const place = document.getElementById("drop");
  place.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture
def folder(detector_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(detector_folder, tmp_path / "tile"))


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Where `dskd page` says that it is, with its token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSKD_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "dskd", "page", str(folder), "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell without job control lets what runs in its background ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert server.stderr is not None
    try:
        said = ""
        for line in server.stderr:
            said += line
            if found := re.search(r"http://\S+", line):
                yield found[0]
                break
        else:
            raise AssertionError(said)
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
    assert server.returncode == 130 and "Traceback" not in rest, rest


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A tab of the page; an error of its script, or anything that its own policy forbids, fails the test."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        tab.on("dialog", lambda dialog: faults.append(f"a script ran: {dialog.message}"))
        tab.goto(address)
        yield tab
        browser.close()
    assert faults == []


def until(page: Any, holds: Callable[[], bool]) -> None:
    """Wait for it; the page's policy forbids the browser to evaluate conditions of text itself."""
    for _ in range(600):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come to hold within 30 seconds")


def is_judged(page: Any) -> bool:
    counts = str(page.locator("#counts").text_content())
    return counts.startswith("3 photos") and "waiting" not in counts


def verdicts(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#list .verdict").all_text_contents()]


def test_from_a_dropped_photo_to_feedback_and_the_new_threshold(
    page: Any, folder: Path, mvtec_root: Path, tmp_path: Path
) -> None:
    photos = [*sorted((mvtec_root / "tile/test/scratch").glob("*.png"))[:2], mvtec_root / "tile/test/good/000.png"]
    names = ["a.png", EVIL, "good.png"]
    until(page, lambda: page.locator("#category").input_value() == "tile")
    assert "token" not in page.url, "an address that is copied must not carry it"
    contents = [base64.b64encode(path.read_bytes()).decode() for path in photos]
    page.evaluate(DROP, [[name, text] for name, text in zip(names, contents, strict=True)])
    until(page, lambda: is_judged(page))
    detector = Detector.load(folder)
    scores = [seen.score for seen in detector.predict(photos)]
    before = detector.record.threshold(0.01).value
    assert verdicts(page) == ["anomalous" if score > before else "good" for score in scores]
    assert page.locator("#list .file").nth(1).text_content() == EVIL

    # arrow keys, the score
    page.keyboard.press("ArrowRight")
    assert page.locator("#name").text_content() == EVIL
    assert float(page.locator("#figures dd").first.text_content()) == pytest.approx(scores[1], rel=1e-3)

    # a moved threshold judges at once, colours the map over the photo, and downloads say the same
    page.fill("#threshold", str(max(scores) * 2))
    assert verdicts(page) == ["good"] * 3
    page.fill("#threshold", str(min(scores) / 2))
    assert verdicts(page) == ["anomalous"] * 3
    painted = "() => document.getElementById('map').getContext('2d').getImageData(0, 0, 64, 64).data.some(Boolean)"
    until(page, lambda: bool(page.evaluate(painted)))
    with page.expect_download() as taken:
        page.click("#jsonl")
    taken.value.save_as(tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == names and {row["verdict"] for row in rows} == {"anomalous"}
    assert [row["score"] for row in rows] == pytest.approx(scores, rel=1e-4)
    assert {row["threshold"] for row in rows} == {min(scores) / 2}
    assert set(detector.predict(photos[0]).to_dict()) <= set(rows[0])
    with page.expect_download() as taken:
        page.click("#csv")
    taken.value.save_as(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == names
    page.select_option("#rates", index=1)

    # a judgement, which changes nothing until someone approves it
    page.keyboard.press("Escape")
    page.locator("#name").click()
    page.click("#good")
    until(page, lambda: page.locator("#judged").text_content().startswith("Judged good"))
    (entry,) = Quarantine.of(folder).entries()
    assert entry.path.read_bytes() == photos[1].read_bytes() and entry.judged == "good"
    version = page.locator("#version").text_content()
    command = [sys.executable, "-m", "dskd", "feedback", str(folder), "--approve", "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    after = read_record(folder)
    until(page, lambda: page.locator("#version").text_content() != version)
    assert page.locator("#version").text_content() == f"detector {after.detector_version}"
    assert float(page.input_value("#threshold")) == pytest.approx(after.threshold(0.01).value, rel=1e-5)
    until(page, lambda: is_judged(page))
    assert verdicts(page)[1].startswith("good"), "what a person called good lies at the new threshold, not above it"


def test_without_the_token_the_page_asks_for_it(page: Any, address: str) -> None:
    plain, _, token = address.partition("#token=")
    messages: list[str] = []
    other = page.context.browser.new_page()
    other.on("console", lambda message: messages.append(message.text))
    other.goto(plain)
    other.locator("#ask-token").wait_for()
    other.fill("#token", token)
    other.keyboard.press("Enter")
    until(other, lambda: other.locator("#category").input_value() == "tile")
    assert any("401" in message for message in messages)
