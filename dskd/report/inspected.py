"""A champion's scores, files and pictures of the images that it is measured on, for its report."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dskd.data.datasets import held_out_names, read_category
from dskd.data.images import checked_mask
from dskd.data.samples import Sample
from dskd.detector import Detector, Prediction
from dskd.draw.verdict import draw_panel, to_webp
from dskd.evaluate import Evaluation
from dskd.metrics import pro_points
from dskd.report.document import ImageScore, Inspected, Picture, ProPoint

NUM_EXTREMES = 5
"""Pictures of the weakest defects, and of the good test images with the highest scores."""
MAX_PICTURE_BYTES = 9000
"""20 pictures of each of 15 categories, as Base64, take 3.6 MB of the 5 MB that a report may have."""
_VIEW = 288
"""Pixels of a view's longer side."""


class _Chosen(NamedTuple):
    """An image to draw, and the score that it is chosen by."""

    sample: Sample
    is_defective: bool
    score: float


def inspect(
    detector: Detector,
    data: Path,
    category: str,
    evaluation: Evaluation | None,
    *,
    trial_id: str,
    threshold: float,
    suspects: Sequence[tuple[str, float]] = (),
    validation: Sequence[ImageScore] = (),
) -> Inspected:
    """Scores and pictures; `evaluation` is that of the test images, None if there are none.

    `suspects` are names and scores of good images as the detector's record has them; a name that is not found is left
    out, as is the picture of a file that can no longer be read. Raises ValueError if the category is not in `data`.
    """
    found = read_category(data, category, detector.record.config.data.layout)
    samples = {sample.path: sample for sample in found.test}
    seen = evaluation.images if evaluation else ()
    chosen = [_Chosen(samples[each.path], each.is_defective, each.score) for each in seen if each.path in samples]
    defects = sorted((each for each in chosen if each.is_defective), key=lambda each: each.score)
    good = sorted((each for each in chosen if not each.is_defective), key=lambda each: -each.score)
    named = dict(zip(held_out_names(found, found.train), found.train, strict=True))
    named |= {sample.path.relative_to(found.folder).as_posix(): sample for sample in found.validation}
    odd = [_Chosen(named[name], False, score) for name, score in suspects if name in named]

    def drawn(images: Sequence[_Chosen]) -> tuple[Picture, ...]:
        return tuple(_pictures(detector, images, threshold, found.folder))

    return Inspected(
        category=category,
        trial_id=trial_id,
        threshold=threshold,
        test=tuple(
            ImageScore(
                file=_below(found.folder, each.path),
                defect=each.defect,
                is_defective=each.is_defective,
                score=each.score,
            )
            for each in seen
        ),
        validation=tuple(validation),
        pro=tuple(ProPoint(*point) for point in pro_points(evaluation.state, (threshold,))) if evaluation else (),
        weakest_defects=drawn(defects[:NUM_EXTREMES]),
        strongest_good=drawn(good[:NUM_EXTREMES]),
        suspects=drawn(odd),
    )


def _pictures(detector: Detector, images: Sequence[_Chosen], threshold: float, folder: Path) -> Iterator[Picture]:
    for each in images:
        framed = detector.load_image(each.sample.path)
        if isinstance(framed, str):
            continue
        (seen,) = detector.predict_framed([each.sample.path], [framed], threshold)
        if not isinstance(seen, Prediction):
            continue
        truth = checked_mask(each.sample) if each.sample.mask is not None else None
        image = draw_panel(seen.panel(is_defective=each.is_defective, truth=truth), _VIEW)
        yield Picture(
            file=_below(folder, each.sample.path),
            defect=each.sample.defect,
            is_defective=each.is_defective,
            score=each.score,
            webp=base64.b64encode(to_webp(image, MAX_PICTURE_BYTES)).decode(),
            width=image.width,
            height=image.height,
        )


def _below(folder: Path, path: Path) -> str:
    """The path below the category's folder; a name that is no valid text is shown as it can be."""
    shown = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return shown.as_posix().encode("utf-8", "backslashreplace").decode()
