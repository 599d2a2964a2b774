"""A prediction's map as one small picture that a browser lays over the image, at any threshold."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from dskd.detector import Prediction
from dskd.draw.verdict import TOP, heat_colours

_LEVELS = 256
_SIDE = 512
"""Most pixels of a map's longer side."""


def palette() -> list[list[int]]:
    """256 colours [red, green, blue] of map values from 0 to `TOP` thresholds, as in all other pictures."""
    colours: list[list[int]] = heat_colours(np.linspace(0, TOP, _LEVELS)).tolist()
    return colours


def map_picture(prediction: Prediction) -> dict[str, Any]:
    """The map as a grey PNG (data URI) of the whole image, reduced; 255 is the value `highest`, 0 is 0.

    Below `floor`, which few good images exceed, there is nothing to be drawn; None: below the threshold.
    """
    share = min(1.0, _SIDE / max(prediction.width, prediction.height))
    heat = prediction.map_of(
        max(1, round(prediction.width * share)), max(1, round(prediction.height * share))
    )  # (h, w)
    highest = max(float(heat.max()), 1e-12)
    grey = np.rint((heat / highest).clip(0, 1) * (_LEVELS - 1)).astype(np.uint8)
    return {"png": _data_uri(Image.fromarray(grey), "png"), "highest": highest, "floor": prediction.floor}


def shown_picture(prediction: Prediction) -> str:
    """The image as people are shown it (data URI of a JPEG), for browsers that cannot read the file."""
    return _data_uri(Image.fromarray(prediction.image), "jpeg")


def _data_uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, **({"compress_level": 1} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
