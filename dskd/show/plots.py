"""Curves of a detector's validation, drawn from every threshold; needs matplotlib (the extra `plots`)."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dskd import metrics
from dskd.evaluate import AnomalyScores, LabelledImages
from dskd.metrics import Curve

_CORNERS = 2000
"""Number of points drawn per curve; a pixel curve has millions of points."""


class _Panel(NamedTuple):
    title: str
    curve: Curve
    hits: str


def draw_curves(seen: AnomalyScores, truth: LabelledImages, title: str) -> Figure:
    """Image ROC, pixel ROC and PRO of one inspection of `truth.images`, with the areas that the metrics report.

    Without any defect pixel only the image ROC is drawn. ValueError if normal or defective images are missing.
    """
    panels = [_Panel("images: ROC", metrics.roc_curve(seen.scores, truth.labels), "defective images found")]
    maps, masks = seen.maps[truth.has_mask], truth.masks[truth.has_mask]
    if masks.any():
        panels.append(_Panel("pixels: ROC", metrics.pixel_roc_curve(maps, masks), "defect pixels found"))
        panels.append(_Panel("regions: PRO", metrics.pro_curve(maps, masks), "mean share found of a defect"))
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for place, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(1, len(panels), place), panel)
    return figure


def _draw(axes: Axes, panel: _Panel) -> None:
    limit = float(panel.curve.fpr[-1])
    area = float(np.trapezoid(panel.curve.hits, panel.curve.fpr)) / limit
    curve = _thinned(panel.curve)
    axes.plot(curve.fpr, curve.hits, color="#1f6f9f", linewidth=1.8)
    axes.fill_between(curve.fpr, curve.hits, color="#1f6f9f", alpha=0.12, linewidth=0)
    axes.set_title(f"{panel.title}, area {area:.4f}", fontsize=10)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("false alarms, as a share of the normals", fontsize=9)
    axes.set_ylabel(panel.hits, fontsize=9)
    axes.grid(alpha=0.25)


def _thinned(curve: Curve) -> Curve:
    if len(curve.fpr) <= _CORNERS:
        return curve
    # Equal steps along the curve, not along its corners: most corners are in a few pixels of the drawing.
    way = np.cumsum(np.append(0.0, np.diff(curve.fpr) + np.diff(curve.hits)))
    chosen = np.unique(np.append(np.searchsorted(way, np.linspace(0, way[-1], _CORNERS)), len(way) - 1))
    chosen = chosen[chosen < len(way)]
    return Curve(curve.fpr[chosen], curve.hits[chosen])
