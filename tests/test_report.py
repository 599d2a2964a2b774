"""The report of a search: its document, its page, and in a real browser what the page counts and asks for."""

import base64
import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dskd.cli.main import main
from dskd.draw.verdict import to_webp
from dskd.evaluate import Evaluation, SeenImage
from dskd.metrics import Scores
from dskd.report.document import (
    CategoryReport,
    Command,
    Fact,
    ImageScore,
    Inspected,
    Limit,
    Picture,
    ProPoint,
    Report,
    Trial,
    read_report,
    to_json,
)
from dskd.report.inspected import MAX_PICTURE_BYTES, NUM_EXTREMES
from dskd.report.judgement import judge
from dskd.report.render import render

HOSTILE = '</script><img src=x onerror="window.broken=1"><!-- {{data}} 𝄞 é'
MAX_BYTES = 5_000_000
CHROMIUM = shutil.which("chromium")


def evaluation_of(images: tuple[ImageScore, ...]) -> Evaluation:
    seen = [SeenImage(Path(each.file), each.defect, each.is_defective, each.score) for each in images]
    return Evaluation(Scores(*[0.5] * 7), tuple(seen))


def inspected_of(name: str, rng: np.random.Generator, webp: str) -> Inspected:
    """150 test images with four kinds of defects, one of them hard."""
    kinds = [("good", 40, 0.8), ("rust", 40, 1.9), (f"scratch {HOSTILE}", 40, 1.5), ("dent", 30, 1.05)]
    test = tuple(
        ImageScore(
            file=f"test/{kind}/{index:03d}.png",
            defect=kind,
            is_defective=kind != "good",
            score=float(np.float32(max(0.1, rng.normal(middle, 0.22)))),
        )
        for kind, count, middle in kinds
        for index in range(count)
    )

    def pictures(images: list[ImageScore]) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                file=each.file, defect=each.defect, is_defective=each.is_defective, score=each.score, webp=webp,
                width=576, height=288,
            )
            for each in images
        )  # fmt: skip

    rising = sorted(test, key=lambda image: image.score)
    defects = [image for image in rising if image.is_defective]
    good = [image for image in reversed(rising) if not image.is_defective]
    limits = np.linspace(3, 0.1, 100)
    return Inspected(
        category=name,
        trial_id="abc_00003",
        threshold=1.25,
        test=test,
        validation=tuple(
            ImageScore(
                file=f"{index:03d}.png", defect="synthetic", is_defective=True, score=float(rng.normal(1.7, 0.3))
            )
            for index in range(64)
        ),
        pro=tuple(ProPoint(float(x), float(np.exp(-2.5 * x)), float(1 / (1 + np.exp(4 * x - 5)))) for x in limits),
        weakest_defects=pictures(defects[:NUM_EXTREMES]),
        strongest_good=pictures(good[:NUM_EXTREMES]),
        suspects=pictures(good[:10]),
    )


def trials_of(rng: np.random.Generator, count: int) -> tuple[Trial, ...]:
    states = ["finished", "finished", "pruned"]
    return tuple(
        Trial(
            number=number,
            state="failed" if number == 7 else states[number % 3],  # type: ignore[arg-type]
            objective=None if number == 7 else float(0.9 + rng.normal(0, 0.02) - 0.05 * (number % 3 == 2)),
            is_untuned=number == 0,
            params={
                "preset": ["dskd", "stfpm"][number % 2],
                "learning_rate": float(10 ** rng.uniform(-4, -2)),
                "blur_sigma": float(rng.uniform(1, 8)),
                "embedding_depth": int(rng.integers(1, 5)),
                HOSTILE: bool(number % 2),
            },
            seconds=60.0 + number,
        )
        for number in range(count)
    )


def report_of(num_categories: int, picture_bytes: int = 0) -> Report:
    """A document like that of a search; pictures of that many bytes, or small ones."""
    rng = np.random.default_rng(0)
    drawn = to_webp(Image.fromarray(rng.integers(60, 120, (288, 576, 3), dtype=np.uint8)), 2000)
    webp = base64.b64encode(drawn + bytes(max(0, picture_bytes - len(drawn)))).decode()
    names = ["flange", "board", "fabric"] + [f"part {number}" for number in range(3, num_categories)]
    categories = []
    for index, name in enumerate(names[:num_categories]):
        inspected = inspected_of(name, rng, webp)
        counts = evaluation_of(inspected.test).confusion(inspected.threshold)
        limit = Limit(value=1.25, false_alarm_rate=[0.02, 0.17, 0.04][index % 3], num_normals=49, is_proven=index == 0)
        figures = {
            "val/objective": 0.93 - index / 100, "gain/objective": 0.0121, "gain/error": 0.0034,
            "test/image_auroc": 0.9632, "test/pixel_auroc": 0.9811, "test/aupro": 0.9123,
            **{f"test/{key}": float(value) for key, value in counts._asdict().items()},
        }  # fmt: skip
        judged = judge(figures, limit)
        categories.append(
            CategoryReport(
                name=name, light=judged.light, sentence=judged.sentence, reason=judged.reason,
                decision="tuning gained +0.0121 ± 0.0034 over the untuned preset, on the 4 other folds",
                changes=f"dskd with blur_sigma 7.67, score_combination product, {HOSTILE}", limit=limit,
                figures=figures, seconds=4000.0 * (index + 1), trials=trials_of(rng, 12),
                importance={"learning_rate": 0.61, "blur_sigma": 0.3} if index == 0 else {},
                importance_note="" if index == 0 else "too few trials to tell: 7 finished ones, 8 are needed",
                normal_scores=tuple(rng.normal(0.8, 0.15, 49).tolist()), inspected=inspected,
                trust=(Fact(name="data", value="sha256 " + "ab" * 32), Fact(name="trial", value="abc_00003")),
                link="http://mlflow:5000/#/experiments/1/runs/2" if index else "",
            )
        )  # fmt: skip
    if num_categories > 2:
        judged = judge({}, None, error=f"ValueError: {HOSTILE}")
        categories[2] = CategoryReport(
            name="fabric", light=judged.light, sentence=judged.sentence, reason=judged.reason, error=judged.reason
        )
    return Report(
        name=f"parts {HOSTILE}",
        written="2026-11-26T23:00:00+00:00",
        data="my-images",
        seconds=5400.0,
        trial_seconds=7200.0,
        caveats=(f"board: its 5 good images vouch for 16.7 % of false alarms. {HOSTILE}", "fabric has no detector."),
        objective="mean of image AUROC and AUPRO on synthetic defects",
        categories=tuple(categories),
        settings=(Fact(name="trials", value="12"), Fact(name="sampler", value="tpe, seed 0")),
        trust=(Fact(name="what chose", value="validation"), Fact(name="test labels", value="opened once")),
        commands=(Command(what="Repeat it", command="python tune/search.py --data 'my images' --name parts"),),
    )


def data_in(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_document_survives_writing_and_reading() -> None:
    report = report_of(3)
    assert read_report(to_json(report)) == report
    document = json.loads(to_json(report))
    assert read_report(json.dumps({**document, "a_field_of_tomorrow": 1})) == report


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "as JSON"),
        ("[1]", "as JSON"),
        ('{"name": "x"}', "schema"),
        ('{"schema": 2}', "up to 1"),
        ('{"schema": 1, "name": 3}', "Expected `str`, got `int` - at `$.name`"),
    ],
)
def test_what_is_no_report_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_report(text)
    assert "\n" not in str(error.value)


def test_the_page_holds_the_document_and_no_name_breaks_out_of_it() -> None:
    report = report_of(3)
    page = render(report)
    assert data_in(page)["report"] == json.loads(to_json(report))
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page and "&lt;/script&gt;" in page.partition("</title>")[0]
    assert page.rstrip().endswith("</html>") and "{{" not in page.replace("{{data}}", "")


def test_the_page_of_15_categories_stays_below_5_mb() -> None:
    assert len(render(report_of(15, MAX_PICTURE_BYTES)).encode()) < MAX_BYTES


def test_the_page_asks_for_nothing_outside() -> None:
    page = render(report_of(1))
    before = page.partition('<script type="application/json"')[0] + page.rpartition("<script>")[2]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", before)
    assert not re.findall(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|localStorage|innerHTML|insertAdjacent", before)
    assert "default-src 'none'" in before


@pytest.mark.parametrize(
    ("missed", "flagged", "rate", "auroc", "light"),
    [
        (4, 1, 0.02, 0.97, "ready"),
        (4, 1, 0.17, 0.97, "more images"),
        (30, 1, 0.17, 0.95, "more images"),
        (30, 1, 0.02, 0.95, "no"),
        (30, 1, 0.17, 0.7, "no"),
        (0, 20, 0.02, 0.99, "no"),
    ],
)
def test_the_light_follows_mistakes_and_good_images(
    missed: int, flagged: int, rate: float, auroc: float, light: str
) -> None:
    counts = {"num_missed": missed, "num_defective": 48, "num_false_alarms": flagged, "num_good": 41}
    figures = {"test/image_auroc": auroc} | {f"test/{name}": float(count) for name, count in counts.items()}
    limit = Limit(value=1.0, false_alarm_rate=rate, num_normals=49, is_proven=True)
    found = judge(figures, limit)
    assert found.light == light
    assert found.sentence.endswith(f"misses {missed} of 48 defects, flags {flagged} of 41 good images.")
    assert judge(figures, limit, is_untrained=True).light == "no"
    assert judge({}, limit).light == "untested" and judge({}, None).light == "no"


def test_the_command_draws_the_same_page_and_refuses_what_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(2)
    (tmp_path / "report.json").write_bytes(to_json(report))
    main(["report", str(tmp_path / "report.json"), "--out", str(tmp_path / "out/page.html")])
    assert (tmp_path / "out/page.html").read_text(encoding="utf-8") == render(report)
    (tmp_path / "notes.txt").write_text("notes")
    for wrong in ("notes.txt", "gone.json"):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path / wrong), "--out", str(tmp_path / "none.html")])
        assert ended.value.code == 2 and not (tmp_path / "none.html").exists()
        assert len(capsys.readouterr().err.splitlines()[-1:]) == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .ci/setup dev")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Any, tmp_path: Path, report: Report, width: int = 1280, **options: Any) -> Iterator[Any]:
    """The page in a fresh browser profile; no error may come of it, nor any request but for itself."""
    file = tmp_path / "report.html"
    file.write_text(render(report), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert errors == []
    context.close()


@pytest.mark.services
def test_the_slider_counts_as_evaluate_does_at_ten_thresholds(browser: Any, tmp_path: Path) -> None:
    report = report_of(2)
    with opened(browser, tmp_path, report) as page:
        for index, category in enumerate(report.categories):
            assert category.inspected is not None
            evaluation = evaluation_of(category.inspected.test)
            section = page.locator("section").nth(index)
            counts, slider = section.locator("output.counts"), section.locator("input[type=range]")
            assert float(counts.get_attribute("data-threshold")) == category.inspected.threshold
            seen = set()
            for position in (None, 0, 100, 250, 333, 420, 500, 610, 777, 900, 1000):
                if position is not None:
                    slider.evaluate(
                        "(it, at) => { it.value = at; it.dispatchEvent(new Event('input')); }", str(position)
                    )
                threshold = float(counts.get_attribute("data-threshold"))
                expected = evaluation.confusion(threshold)
                seen.add(expected)
                text = counts.inner_text()
                assert f"misses {expected.num_missed} of {expected.num_defective} defects" in text
                assert f"flags {expected.num_false_alarms} of {expected.num_good} good images" in text
                kinds = section.locator("tbody").first.locator("tr").all_inner_texts()
                found = dict(row.split("\t")[:2] for row in kinds)
                recall = evaluation.recall(threshold)
                assert found == {name: f"{each.num_found} of {each.num_images}" for name, each in recall.items()}
            assert len(seen) > 7, "the thresholds must differ in what they do"
            before = counts.get_attribute("data-threshold")
            slider.press("ArrowLeft")
            assert counts.get_attribute("data-threshold") != before
            section.get_by_role("button", name="Back to the stored one").click()
            assert float(counts.get_attribute("data-threshold")) == category.inspected.threshold


@pytest.mark.services
def test_the_page_says_what_the_document_says_and_sorts_it(browser: Any, tmp_path: Path) -> None:
    report = report_of(3)
    with opened(browser, tmp_path, report) as page:
        assert page.evaluate("window.broken") is None
        assert HOSTILE in page.locator("h1").inner_text()
        assert page.locator(".caveats li").all_inner_texts() == list(report.caveats)
        cards = page.locator(".cards > li").all_inner_texts()
        for card, category in zip(cards, report.categories, strict=True):
            assert category.name in card and category.sentence in card
        rows = page.locator("table.blocks tbody tr")
        shown = {row.split("\t")[0]: row.split("\t")[1:] for row in rows.all_inner_texts()}
        for category in report.categories[:2]:
            figures = category.figures
            assert shown[category.name][:7] == [
                f"{figures['val/objective']:.4f}",
                f"+{figures['gain/objective']:.4f} ± {figures['gain/error']:.4f}",
                *(f"{figures[f'test/{name}']:.4f}" for name in ("image_auroc", "pixel_auroc", "aupro")),
                f"{figures['test/num_missed']:.0f} of {figures['test/num_defective']:.0f}",
                f"{figures['test/num_false_alarms']:.0f} of {figures['test/num_good']:.0f}",
            ]
        head = page.locator("th", has_text="validation").first
        for direction, expected in (("descending", ["flange", "board"]), ("ascending", ["board", "flange"])):
            head.get_by_role("button").press("Enter")
            assert head.get_attribute("aria-sort") == direction
            order = [row.split("\t")[0] for row in rows.all_inner_texts()]
            assert order == [*expected, "fabric"], "what is unknown comes last"
        files = [each.file for each in report.categories[0].inspected.weakest_defects]  # type: ignore[union-attr]
        captions = page.locator("section").first.locator("figcaption").all_inner_texts()
        assert all(file in caption for file, caption in zip(files, captions, strict=False))
        assert page.locator("circle.hollow").count() == 8, "of each category's twelve trials four were pruned"


@pytest.mark.services
def test_ranges_are_brushed_by_pointer_and_by_keys_over_all_categories(browser: Any, tmp_path: Path) -> None:
    with opened(browser, tmp_path, report_of(2)) as page:
        said = page.get_by_text("trials in the chosen ranges")
        assert said.inner_text().startswith("22 of 22")
        axis = page.locator("g[data-axis='category']")
        axis.scroll_into_view_if_needed()
        area = axis.locator("rect.hit").bounding_box()
        page.mouse.move(area["x"] + 16, area["y"] + area["height"] * 0.7)
        page.mouse.down()
        page.mouse.move(area["x"] + 16, area["y"] + area["height"])
        page.mouse.up()
        assert said.inner_text().startswith("11 of 22")
        assert page.locator("path.trial.out").count() == 11
        axis.press("Escape")
        assert said.inner_text().startswith("22 of 22")
        page.locator("g[data-axis='learning_rate']").press("ArrowUp")
        assert 0 < int(said.inner_text().split()[0]) < 22


@pytest.mark.services
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_telephone_and_a_wide_screen(browser: Any, tmp_path: Path, scheme: str) -> None:
    for width in (360, 1920):
        with opened(browser, tmp_path, report_of(3), width, color_scheme=scheme) as page:
            across, down = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollHeight]")
            assert across <= width and down > 1000
            sizes = page.evaluate("[...document.querySelectorAll('.chart svg')].map((each) => each.clientWidth)")
            assert sizes and all(200 < size <= width for size in sizes)
            ink, paper = page.evaluate(
                "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
            )
            brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
            assert (brightness[0] < brightness[1]) == (scheme == "light")


@pytest.mark.services
def test_print_shows_everything_on_white(browser: Any, tmp_path: Path) -> None:
    with opened(browser, tmp_path, report_of(2), width=700, color_scheme="dark") as page:  # A4 within its margins
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("details:not([open])").count() == 0
        assert not page.locator("input[type=range]").first.is_visible()
        across = page.locator("table.blocks").evaluate("it => [it.scrollWidth, it.parentElement.clientWidth]")
        assert across[0] <= across[1], "no column is cut off"
        assert page.pdf(format="A4").startswith(b"%PDF")
