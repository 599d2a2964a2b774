"""Images judged later: what they change in a detector, what they leave alone, and where they come from."""

import json
import shutil
from pathlib import Path

import pytest

from dskd.checkpoint import read_record, write_detector
from dskd.cli.main import main
from dskd.data.datasets import read_category
from dskd.detector import Detector, basis_of
from dskd.jobs import feedback as feedback_module
from dskd.jobs.feedback import Quarantine, QuarantineFullError, accept, accepted_images, entries_of


@pytest.fixture
def folder(detector_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(detector_folder, tmp_path / "tile"))


@pytest.fixture
def good(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test/good").glob("*.png"))


@pytest.fixture
def defects(mvtec_root: Path) -> list[Path]:
    return sorted((mvtec_root / "tile/test/scratch").glob("*.png"))


def test_good_images_recalibrate_and_defects_are_counted(folder: Path, good: list[Path], defects: list[Path]) -> None:
    detector = Detector.load(folder)
    before = detector.record
    weights = (folder / "model.safetensors").read_bytes()
    scores = [seen.score for seen in detector.predict(good)]
    found = accept(detector, folder, [*entries_of(good, "good"), *entries_of(defects, "defect")])
    after = read_record(folder)
    assert sorted(after.normal_scores) == pytest.approx(sorted([*before.normal_scores, *scores]))
    assert len(after.normal_scores) == 6 and after.threshold(0.3).value == sorted(after.normal_scores)[4]
    assert (found.num_added, found.num_good, found.num_defective) == (8, 4, 4)
    missed = sum(seen.score <= found.after.value for seen in detector.predict(defects))
    assert found.num_missed == after.metrics["feedback/num_missed"] == missed
    assert found.num_false_alarms == sum(score > found.before.value for score in scores)
    assert found.version_after == after.detector_version != before.detector_version
    assert (folder / "model.safetensors").read_bytes() == weights, "nothing is trained"
    assert after.num_feedback == 4 and after.is_approximate and "people chose" in basis_of(after)
    assert before.metrics.items() <= after.metrics.items()


def test_feedback_keeps_where_each_image_came_from(folder: Path, good: list[Path]) -> None:
    found = accept(Detector.load(folder), folder, entries_of(good[:2], "good"))
    lines = [json.loads(line) for line in (folder / "feedback/log.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [str(path) for path in good[:2]]
    assert {(line["judged"], line["source"]) for line in lines} == {("good", "files")}
    assert {line["version_after"] for line in lines} == {found.version_after}
    assert {path.read_bytes() for path in accepted_images(folder, "good")} == {path.read_bytes() for path in good[:2]}


def test_the_same_image_counts_once_and_the_last_judgement_holds(folder: Path, good: list[Path]) -> None:
    first = read_record(folder)
    accept(Detector.load(folder), folder, entries_of(good, "good"))
    once = read_record(folder)
    again = accept(Detector.load(folder), folder, entries_of(good, "good"))
    assert (again.num_added, again.num_known) == (0, 4)
    assert read_record(folder).detector_version == once.detector_version
    changed = accept(Detector.load(folder), folder, entries_of(good, "defect"))
    assert (changed.num_good, changed.num_defective) == (0, 4)
    assert read_record(folder).normal_scores == first.normal_scores, "as if they had never been called good"
    assert read_record(folder).detector_version == first.detector_version


def test_an_image_cannot_be_good_and_a_defect_nor_unreadable(folder: Path, good: list[Path], tmp_path: Path) -> None:
    before = (folder / "detector.json").read_bytes()
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="are the same image, given as good and as a defect"):
        accept(Detector.load(folder), folder, [*entries_of(good, "good"), *entries_of(good[:1], "defect")])
    with pytest.raises(ValueError, match=r"bad\.png is not a readable image .* Nothing was changed"):
        accept(
            Detector.load(folder), folder, [*entries_of(good, "good"), *entries_of([tmp_path / "bad.png"], "defect")]
        )
    assert (folder / "detector.json").read_bytes() == before and not (folder / "feedback").exists()


def test_a_training_into_the_same_folder_keeps_what_people_judged(folder: Path, good: list[Path]) -> None:
    from dskd.checkpoint import read_detector

    record, weights = read_detector(folder)
    accept(Detector.load(folder), folder, entries_of(good, "good"))
    write_detector(folder, record, weights)
    assert read_record(folder).num_feedback == 0 and len(accepted_images(folder, "good")) == 4
    found = accept(Detector.load(folder), folder, [])
    assert found.num_good == 4 and read_record(folder).num_feedback == 4


def test_the_command_approves_a_quarantine_or_empties_it(
    folder: Path, good: list[Path], defects: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    held = Quarantine.of(folder)
    held.keep(good[0].read_bytes(), "good", "=cmd|calc\n.png", "v1")
    held.keep(defects[0].read_bytes(), "defect", "b.png", "v1")
    before = read_record(folder).detector_version
    main(["feedback", str(folder)])
    assert "2 judged images wait in" in capsys.readouterr().err and read_record(folder).detector_version == before
    main(["feedback", str(folder), "--approve", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (document["num_added"], document["in_quarantine"], document["num_good"]) == (2, 0, 1)
    assert not list(held.entries()) and not list(held.folder.iterdir())
    lines = [json.loads(line) for line in (folder / "feedback/log.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"page"} and lines[0]["name"] in ("=cmd|calc\n.png", "b.png")
    held.keep(good[1].read_bytes(), "good", "c.png", "v1")
    main(["feedback", str(folder), "--refuse"])
    assert not list(held.entries()) and len(accepted_images(folder, "good")) == 1
    with pytest.raises(SystemExit):
        main(["feedback", str(folder), "--refuse", "--approve"])
    assert "exclude each other" in capsys.readouterr().err


def test_a_quarantine_takes_no_more_than_it_may_and_no_note_leads_out(
    folder: Path, good: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Quarantine.of(folder)
    monkeypatch.setattr(feedback_module, "MAX_ENTRIES", 1)
    note = held.keep(good[0].read_bytes(), "good", "a.png", "v1")
    with pytest.raises(QuarantineFullError, match="someone has to look at it"):
        held.keep(good[1].read_bytes(), "good", "b.png", "v1")
    held.keep(good[0].read_bytes(), "defect", "a.png", "v1")  # no more room is needed
    (path,) = held.folder.glob("*.json")
    path.write_text(json.dumps(note | {"file": "../../detector.json"}))
    with pytest.raises(ValueError, match="names no judged image beside it"):
        list(held.entries())


def test_accepted_images_go_where_the_next_search_finds_them(
    folder: Path, good: list[Path], defects: list[Path], mvtec_root: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(mvtec_root, tmp_path / "data"))
    command = ["feedback", str(folder), "--good", str(good[0]), "--defect", str(defects[0]), "--data", str(data)]
    before = read_category(data, "tile")
    for _ in range(2):  # the second changes nothing
        main(command)
        after = read_category(data, "tile")
        assert len(after.train) == len(before.train) + 1
        (defect,) = after.validation
        assert defect.is_defective and defect.path.read_bytes() == defects[0].read_bytes()
