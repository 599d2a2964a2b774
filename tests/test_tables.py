"""Tables of the application on terminals of any width."""

import io

import pytest
from rich.console import Console

from tune.jobs.tables import print_line, print_rows

COLUMNS = ("category", "validation", "folder")
ROWS = (("hazelnut", "0.9132", "champions/hazelnut"), ("a [b] c", "–", "champions/a [b] c"))


def printed(width: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, highlight=False)
    print_rows(console, "Champions of parts", COLUMNS, ROWS)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_wide_terminal_gets_a_table() -> None:
    lines = printed(80)
    assert lines[0].strip() == "Champions of parts"
    assert [cell.strip() for cell in lines[2].strip("┃").split("┃")] == list(COLUMNS)
    assert [cell.strip() for cell in lines[4].strip("│").split("│")] == list(ROWS[0])


@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal_gets_a_block_per_row_with_every_word_whole(width: int) -> None:
    assert printed(width) == [
        "Champions of parts",
        "hazelnut",
        "  validation  0.9132",
        "  folder      champions/hazelnut",
        "a [b] c",
        "  validation  –",
        "  folder      champions/a [b] c",
    ]


def test_a_line_breaks_between_words() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=20)
    print_line(console, "pull: python tune/pull.py all --name [parts]")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "pull: python\n  tune/pull.py all\n  --name [parts]\n"
