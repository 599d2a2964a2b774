import os
import socket
from pathlib import Path

import pytest

from dskd.data.files import UnreadableImageError, check_regular, class_folders, list_images, walk


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def test_images_of_every_suffix_are_found_in_order_and_the_rest_is_counted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b.PNG", "a/2.jfif", "a/1.jp2", "c/d/e.pgm", "z.tiff")))
    touch(*(tmp_path / name for name in ("notes.txt", "a/other.TXT", "a/raw.dng", "README")))
    found = walk(tmp_path)
    assert names(tmp_path) == ["a/1.jp2", "a/2.jfif", "b.PNG", "c/d/e.pgm", "z.tiff"]
    assert found.others == {".txt": 2, ".dng": 1, "": 1} and found.num_unread == 4
    assert "2 .txt" in found.describe() and "without suffix" in found.describe()
    assert [path.name for path in list_images(tmp_path, is_deep=False)] == ["b.PNG", "z.tiff"]


@pytest.mark.parametrize(
    "name",
    [".hidden", "@eaDir", "@tmp", "__MACOSX", "thumbnails", "Thumbs", "#recycle", "$RECYCLE.BIN", ".ipynb_checkpoints"],
)
def test_service_folders_are_left_out_and_their_files_counted(name: str, tmp_path: Path) -> None:
    touch(
        tmp_path / "a.png", tmp_path / name / "a.png", tmp_path / name / "deep/b.png", tmp_path / "sub" / name / "c.png"
    )
    found = walk(tmp_path)
    assert names(tmp_path) == ["a.png"] and found.left_out == {name: 3}
    assert [folder.name for folder in class_folders(tmp_path)] == ["sub"]
    assert names(tmp_path / name) == ["a.png", "deep/b.png"], "who names it wants it read"


def test_service_files_are_left_out_and_counted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.png", "._a.png", "._b.png", ".c.png", "Thumbs.db", "desktop.ini")))
    found = walk(tmp_path)
    assert names(tmp_path) == ["a.png"]
    assert found.left_out == {"._*": 2, ".c.png": 1, "Thumbs.db": 1, "desktop.ini": 1} and not found.others


@pytest.mark.parametrize(
    "result",
    [("predictions.jsonl", "overlays/0.png"), ("detector.json", "model.safetensors"), ("summary.json", "verdicts/x")],
)
def test_what_a_command_of_ours_wrote_is_no_image(result: tuple[str, str], tmp_path: Path) -> None:
    touch(tmp_path / "a.png", *(tmp_path / "out" / name for name in (*result, "preview.png")))
    found = walk(tmp_path)
    assert names(tmp_path) == ["a.png"] and found.left_out == {"an output folder": 3}
    touch(tmp_path / "plain" / result[0], tmp_path / "plain/b.png")
    assert names(tmp_path) == ["a.png", "plain/b.png"], "one such file alone tells nothing"


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "real/a.png", tmp_path / "elsewhere/b.png")
    root = tmp_path / "real"
    (root / "up").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "gone.png").symlink_to(root / "nothing")
    assert names(root) == ["a.png", "gone.png", "itself.png", "linked/b.png"]


def test_a_folder_and_a_link_to_it_give_each_image_once_by_its_own_path(tmp_path: Path) -> None:
    touch(tmp_path / "z/a.png")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert names(tmp_path) == ["z/a.png"]


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))
    touch(odd)
    assert list_images(tmp_path) == [odd]


def test_what_is_no_plain_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.png")
        os.close(here)
        for name, message in {
            "pipe.png": "it is a pipe", "zero.png": "it is a device", "socket.png": "it is a socket",
            "itself.png": "not a readable image", "gone.png": "does not exist",
        }.items():  # fmt: skip
            with pytest.raises(UnreadableImageError, match=message) as raised:
                check_regular(tmp_path / name)
            assert name in str(raised.value) and "\n" not in str(raised.value)
    touch(tmp_path / "plain.png")
    check_regular(tmp_path / "plain.png")
