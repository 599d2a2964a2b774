import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dskd.data.datasets import find_categories, fingerprint, read_category, read_test_split
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.storage import staging
from tune.storage.files import Storage, StorageError
from tune.storage.staging import local_copy, outline
from tune.storage.uris import absolute

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def address(mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A data set that is reached by an address, and a node without any copy."""
    shutil.copytree(mvtec_root, tmp_path / "bucket" / "sets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(staging, "_copies_in_use", {})
    yield f"file://{tmp_path}/bucket/sets"
    end_process()


def end_process() -> None:
    """As when the process that reads the copies has ended, which closes its files."""
    for lock in staging._copies_in_use.values():
        lock.close()
    staging._copies_in_use.clear()


@pytest.fixture
def copies(address: str, tmp_path: Path) -> Path:
    return tmp_path / "cache" / "dskd" / "data"


def copied(copies: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in copies.iterdir() if path.is_dir())


def test_a_folder_is_read_where_it_lies(mvtec_root: Path) -> None:
    assert local_copy(str(mvtec_root), "tile", 0.0) == mvtec_root
    with outline(str(mvtec_root)) as root:
        assert root == mvtec_root
    assert absolute("data") == str(Path.cwd() / "data") and absolute("s3://b/d/") == "s3://b/d"


def test_a_copy_holds_one_category_as_it_is(address: str, mvtec_root: Path) -> None:
    root = local_copy(f"{address}/", "tile", 1.0)
    assert list(find_categories(root)) == ["tile"]
    there, here = read_category(mvtec_root, "tile"), read_category(root, "tile")
    for split in ("train", "test"):
        ours, theirs = getattr(here, split), getattr(there, split)
        assert [(each.path.name, each.defect) for each in ours] == [(each.path.name, each.defect) for each in theirs]
        assert fingerprint(each.path for each in ours) == fingerprint(each.path for each in theirs)
        assert [each.mask is not None for each in ours] == [each.mask is not None for each in theirs]


def test_what_belongs_to_no_category_comes_with_each(address: str, tmp_path: Path) -> None:
    sets = tmp_path / "bucket/sets"
    shutil.rmtree(sets)
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "fryum"):
        for index in range(3):
            image = f"{name}/Data/Images/Normal/{index}.JPG"
            (sets / image).parent.mkdir(parents=True, exist_ok=True)
            (sets / image).write_bytes(b"pixels")
            rows.append(f"{name},train,normal,{image},")
    (sets / "split_csv").mkdir()
    (sets / "split_csv/1cls.csv").write_text("\n".join(rows))
    with outline(address) as root:
        assert [len(read_category(root, name).train) for name in ("candle", "fryum")] == [3, 3]
        assert (root / "candle/Data/Images/Normal/0.JPG").stat().st_size == 0
    root = local_copy(address, "fryum", 1.0)
    assert len(read_category(root, "fryum").train) == 3 and not (root / "candle").exists()


def test_an_address_that_is_one_category_keeps_its_name(address: str) -> None:
    with outline(f"{address}/wood") as root:
        assert list(find_categories(root)) == ["wood"]
    assert list(find_categories(local_copy(f"{address}/wood", "wood", 1.0))) == ["wood"]


def test_faults_name_the_address(address: str, tmp_path: Path) -> None:
    (tmp_path / "bucket/sets/tile/test/scratch/000.png").unlink()
    with pytest.raises(ValueError, match=rf"mask {address}/tile/ground_truth/scratch/000_mask.png has no image"), \
         outline(address) as root:  # fmt: skip
        read_test_split(root, "tile")
    with pytest.raises(ValueError, match=f"no category 'bolt' in {address}; it holds: tile, wood"):
        local_copy(address, "bolt", 1.0)
    with pytest.raises(ValueError, match="--data file:///none/of/it holds no file"), outline("file:///none/of/it"):
        pass
    with pytest.raises(StorageError, match="--data nope://bucket cannot be opened"), outline("nope://bucket"):
        pass
    chosen = SearchSettings(data=address, categories="wood")
    with outline(address) as root:
        assert plan_search(chosen, resolve_addresses(chosen), root).categories == ("wood",)


def test_processes_of_a_node_share_one_copy_and_other_data_is_another(
    address: str, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = Storage.fetch
    monkeypatch.setattr(Storage, "fetch", lambda self, name, path: (fetched.append(name), fetch(self, name, path))[1])  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(4) as pool:
        roots = set(pool.map(lambda _: local_copy(address, "tile", 1.0), range(4)))
    assert len(roots) == 1 and len(fetched) == len(set(fetched)) == 12 + 8 + 4
    os.utime(tmp_path / "bucket/sets/tile/train/good/000.png", ns=(0, 0))
    assert local_copy(address, "tile", 1.0) not in roots
    assert copied(copies) == ["tile", "tile"]


def test_a_copy_appears_whole_or_not_at_all(address: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Storage, name: str, path: Path) -> None:
        path.write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "fetch", cut)
        with pytest.raises(StorageError, match="gave 4 bytes, its listing says"):
            local_copy(address, "tile", 1.0)
    assert copied(copies) == []
    (copies / ".tile-killed-while-copying").mkdir()
    local_copy(address, "tile", 1.0)
    assert copied(copies) == ["tile"] and not list(copies.glob(".*"))


def test_room_is_made_for_a_copy_but_never_from_one_in_use(
    address: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in local_copy(address, "tile", 1.0).rglob("*") if file.is_file())
    fits_one = 1.5 * size / 1e9
    with pytest.raises(ValueError, match=r"takes .* GB beside .* GB in use in .*, --cache-gb allows .*; raise it"):
        local_copy(address, "wood", fits_one)
    assert copied(copies) == ["tile"]
    end_process()
    local_copy(address, "wood", fits_one)
    assert copied(copies) == ["wood"]


def test_a_killed_process_keeps_no_copy_in_use(address: str, copies: Path) -> None:
    body = (
        "import os\nfrom tune.storage.staging import local_copy\n"
        f"local_copy({address!r}, 'tile', 1.0)\nos.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", body], cwd=ROOT, timeout=120, check=False)
    assert copied(copies) == ["tile"]
    size = sum(file.stat().st_size for file in copies.rglob("*.png"))
    local_copy(address, "wood", 1.5 * size / 1e9)
    assert copied(copies) == ["wood"]
