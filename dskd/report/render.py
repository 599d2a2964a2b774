"""Writes a search's report as one HTML file that needs no network: template, style, script and data in one."""

import html
import json
from importlib.resources import files

import numpy as np

from dskd.draw.verdict import TOP, heat_colours
from dskd.report.document import Report, to_json
from dskd.report.judgement import RULE

_NUM_COLOURS = 13


def render(report: Report) -> str:
    """The page. The document is in it as data, and its script draws everything from that."""
    here = files("dskd.report")
    data = {"report": json.loads(to_json(report)), "colours": colour_scale(), "rule": RULE}
    parts = {
        "title": html.escape(f"{report.name}: report of a search"),
        "style": here.joinpath("report.css").read_text(encoding="utf-8"),
        "script": here.joinpath("report.js").read_text(encoding="utf-8"),
        "data": as_script_data(data),
    }
    page = here.joinpath("report.html").read_text(encoding="utf-8")
    before, *rest = page.split("{{")
    # One pass: what a part holds is never taken for the place of another.
    return before + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in rest)


def as_script_data(data: object) -> str:
    r"""JSON that cannot end the script element that it stands in.

    >>> as_script_data({"name": "</script><b>"})
    '{"name":"\\u003c/script>\\u003cb>"}'
    """
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def colour_scale() -> list[tuple[float, str]]:
    """Multiples of the threshold and their colours in all pictures, as #rrggbb."""
    multiples = np.linspace(0, TOP, _NUM_COLOURS)
    return [
        (float(multiple), "#{:02x}{:02x}{:02x}".format(*colour))
        for multiple, colour in zip(multiples, heat_colours(multiples).tolist(), strict=True)
    ]
