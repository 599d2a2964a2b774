import shutil
from pathlib import Path
from typing import Any

import pytest

from tune.preflight.identity import check_continues, record
from tune.settings.plan import SearchPlan, plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.storage.files import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "parts"))


def begin(storage: Storage, *categories: str, gpus: float = 0.0, **values: Any) -> None:
    plan = planned(Path(storage.uri).parent / "outline", *categories, **{"epochs": 30, **values})
    check_continues(storage, plan)
    record(storage, plan, gpus)


def planned(root: Path, *categories: str, **values: Any) -> SearchPlan:
    """The plan of a search of these categories, whose data lie elsewhere."""
    for category in categories:
        (root / category / "train" / "good").mkdir(parents=True, exist_ok=True)
    asked = SearchSettings(**{"data": "data", "name": "parts", "categories": ",".join(categories), **values})
    return plan_search(asked, resolve_addresses(asked), root)


def test_the_same_search_goes_on_with_more_trials_at_another_pace(storage: Storage) -> None:
    begin(storage, "bolt", "screw")
    begin(storage, "bolt", "screw", trials=50, max_concurrent=3, time_budget="2h", cache_gb=1.0, json=True)


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        ({"epochs": 100}, "epochs 30, got 100"),
        ({"epochs": None, "steps": 300}, "steps none, got 300"),
        ({"image_size": 64}, "image_size 256, got 64"),
        ({"batch_size": 4}, "batch_size 16, got 4"),
        ({"preset": "aand"}, r"preset \['dskd'\], got \['aand'\]"),
        ({"data": "other"}, "data '.*/data', got '.*/other'"),
        ({"selection": "oracle"}, "selection 'val', got 'oracle'"),
        ({"textures": Path("dtd")}, "textures '', got '.*/dtd'"),
        ({"seed": 1}, "seed 0, got 1"),
        ({"sampler": "random"}, "sampler 'tpe', got 'random'"),
        ({"start_from": "spring"}, r"start_from \[\], got \['spring'\]"),
        ({"workers_per_trial": 2}, "workers_per_trial 1, got 2"),
        ({"gpus": 1.0}, "gpus_per_worker 0.0, got 1.0"),
    ],
)
def test_another_search_under_the_same_name_is_refused_in_one_line(
    values: dict[str, Any], difference: str, storage: Storage
) -> None:
    begin(storage, "bolt")
    expected = f"search 'parts' of bolt was begun with {difference}; .* give another --name"
    with pytest.raises(ValueError, match=expected) as raised:
        begin(storage, "bolt", **values)
    assert "\n" not in str(raised.value)
    begin(storage, "bolt")


def test_a_changed_space_is_refused_and_the_dimension_is_named(
    storage: Storage, mvtec_root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "space.toml"
    given: dict[str, Any] = {"data": str(mvtec_root), "space": file}
    for before, after, difference in (
        ("hkd_weight = {low = 0, high = 1}", "hkd_weight = {low = 0, high = 2}", "high of hkd_weight 1.0, got 2.0"),
        ("hkd_weight = {low = 0, high = 1}", "hkd_weight = 1.0", "hkd_weight 0.0, got 1.0"),
        ("level_fusion = ['sum', 'max']", "", r"options of level_fusion \['sum', 'max'\], got \['sum', 'product'\]"),
    ):
        place = Storage(f"{storage.uri}-{len(difference)}")
        file.write_text(before)
        begin(place, "tile", **given)
        begin(place, "tile", **given)
        file.write_text(after)
        with pytest.raises(ValueError, match=f"was begun with {difference}"):
            begin(place, "tile", **given)


def test_each_category_of_a_name_may_be_searched_its_own_way(storage: Storage) -> None:
    begin(storage, "bolt")
    begin(storage, "screw", epochs=9, image_size=64)
    with pytest.raises(ValueError, match=r"of screw was begun with .* 9, got 30|image_size 64, got 256"):
        begin(storage, "bolt", "screw")


def test_nothing_is_recorded_by_looking(storage: Storage) -> None:
    check_continues(storage, planned(Path(storage.uri).parent / "outline", "bolt"))
    assert storage.names("identity") == []


def test_two_searches_of_one_name_in_one_database_have_studies_of_their_own_and_keep_them(tmp_path: Path) -> None:
    url = "postgresql://db/optuna"
    names = []
    for storage in ("one", "two", "one"):
        plan = planned(tmp_path / "outline", "bolt", storage=str(tmp_path / storage), study_storage=url)
        names.append(record(Storage(plan.addresses.home), plan, 0.0)["bolt"])
    assert names[0] == names[2] != names[1] and all(name.startswith("parts/bolt/") for name in names)
    moved = tmp_path / "three"
    shutil.copytree(tmp_path / "one", moved)
    plan = planned(tmp_path / "outline", "bolt", storage=str(moved), study_storage=url)
    assert record(Storage(plan.addresses.home), plan, 0.0)["bolt"] == names[0], "its study moves with its folder"


def test_a_study_in_a_file_of_the_storage_has_its_plain_name_as_has_an_older_one(storage: Storage) -> None:
    plan = planned(Path(storage.uri).parent / "outline", "bolt", storage=str(Path(storage.uri).parent))
    assert record(storage, plan, 0.0) == {"bolt": "parts/bolt"}
    document = storage.read_json("identity/bolt.json") or {}
    del document["study"]
    storage.write_json("identity/bolt.json", document)
    assert record(storage, plan, 0.0) == {"bolt": "parts/bolt"}
