"""A detector as served by MLflow: images in, verdicts out.

MLflow runs this file wherever the registered model is loaded, together with the packed code of `dskd`;
code and weights are plain files, no pickle. The search never imports this file, it only packs it.
"""

import base64
import binascii
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dskd.data.parts import part_name
from dskd.detector import Detector, unreadable_to_dict

IMAGE, NAME = "image", "name"
FALSE_ALARM_RATE = "false_alarm_rate"
_URL_SAFE = str.maketrans("-_", "+/")


def decoded(text: object) -> bytes:
    """The bytes of an image sent as base64 text, with or without line breaks and padding, in either alphabet.

    A data URI (`data:image/png;base64,…`) is taken too. Raises ValueError, which continues "row 0 …".
    """
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    if not isinstance(text, str):
        raise ValueError(f"is no text but {type(text).__name__}: expected an image as base64 text")
    head, comma, rest = text.lstrip().partition(",")
    is_uri = head[:5].lower() == "data:"
    if is_uri and not (comma and head.lower().rstrip().endswith(";base64")):
        raise ValueError("is a data URI without ;base64, before its data: expected data:image/png;base64,…")
    packed = "".join((rest if is_uri else text).split()).rstrip("=").translate(_URL_SAFE)
    if not packed:
        raise ValueError("is empty: expected an image as base64 text")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is not base64 text: {error}") from None


class _UnknownParameters(logging.Filter):
    """Makes a refusal of MLflow's warning that it leaves parameters out which the model does not know.

    MLflow takes them away before the model is asked, so that its warning is the only sign of them; a mistyped
    false_alarm_rate would else be answered with the usual one.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if said.startswith("Unrecognized params") and f"{{'{FALSE_ALARM_RATE}'}}" in said:
            names = said.partition("[")[2].partition("]")[0]
            raise MlflowException.invalid_parameter_value(
                f"unknown parameters {names}; there is one: {FALSE_ALARM_RATE}, in (0, 1)."
            )
        return True


def checked_rate(params: dict[str, Any] | None) -> float:
    """The false-alarm rate of a request; refuses other parameters, and a rate outside (0, 1)."""
    given = params or {}
    if unknown := sorted(set(given) - {FALSE_ALARM_RATE}):
        raise MlflowException.invalid_parameter_value(
            f"unknown parameters {', '.join(map(repr, unknown))}; there is one: {FALSE_ALARM_RATE}, in (0, 1)."
        )
    rate = given.get(FALSE_ALARM_RATE, 0.01)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise MlflowException.invalid_parameter_value(
            f"{FALSE_ALARM_RATE} must lie in (0, 1), got {rate!r}; 0.05 is one in twenty."
        )
    return float(rate)


PART_COLUMNS = ("part", "part_verdict", "part_score", "part_threshold")
"""What is said of the part that an image shows: equal in all rows of one part, of which the worst decides."""


class ServedDetector(PythonModel):
    """A detector behind MLflow's `predict` and `/invocations`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read and verify the packed detector folder."""
        logger = logging.getLogger("mlflow.models.utils")
        if not any(isinstance(each, _UnknownParameters) for each in logger.filters):
            logger.addFilter(_UnknownParameters())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._detector = Detector.load(Path(context.artifacts["detector"]), device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row per image of the column `image`, each the base64 text of a PNG, JPEG or other image file.

        The columns are those of `Prediction.to_dict`; the image is called as in the column `name`, where that is
        missing "row 0" and so on. The parameter `false_alarm_rate`, in (0, 1), chooses the threshold; any other is
        refused. An image that cannot be read has the verdict "unreadable", and `error` says why. A request without any
        readable image is refused (400), naming each. Detectors that know parts answer `PART_COLUMNS` too.
        """
        origin = self._detector.record.origin
        rate = checked_rate(params)
        threshold = self._detector.threshold(rate).value
        names = _names(model_input)
        rows: list[dict[str, Any]] = []
        with TemporaryDirectory(prefix="dskd-") as temporary:
            paths, errors = [], {}
            for number, text in enumerate(model_input[IMAGE]):
                path = Path(temporary, f"row {number}")
                try:
                    path.write_bytes(decoded(text))
                    paths.append(path)
                except ValueError as error:
                    errors[number] = f"row {number} {error}"
            found = self._detector.inspect(paths, threshold)
            for number in range(len(model_input)):
                if number in errors:
                    rows.append(unreadable_to_dict(origin, f"row {number}", threshold, errors[number]))
                    continue
                row = next(found).to_dict() | {"image": f"row {number}"}
                if row["error"]:  # its message has the file's temporary folder, which callers must not see
                    row["error"] = row["error"].replace(f"{temporary}/", "")
                rows.append(row)
        if rows and all(row["error"] for row in rows):
            raise MlflowException.invalid_parameter_value("; ".join(row["error"] for row in rows))
        for number, name in enumerate(names):
            rows[number]["image"] = name or rows[number]["image"]
        if self._detector.record.part_thresholds:
            rows = self._with_parts(rows, names, rate)
        # Objects, or pandas would turn a missing score into NaN, which is no JSON.
        return pd.DataFrame(rows, dtype=object)

    def _with_parts(self, rows: list[dict[str, Any]], names: list[str | None], rate: float) -> list[dict[str, Any]]:
        """The rows, each with the verdict on the part that its name tells; None for all of it without a name."""
        pattern = self._detector.record.config.data.group_by
        named = [(name, row["score"]) for name, row in zip(names, rows, strict=True) if name]
        verdicts = {verdict.part: verdict for verdict in self._detector.judge_parts(named, rate)}
        found = []
        for name, row in zip(names, rows, strict=True):
            of_part = verdicts[part_name(name, pattern)] if name else None
            values = (of_part.part, of_part.verdict, of_part.score, of_part.threshold) if of_part else (None,) * 4
            found.append(row | dict(zip(PART_COLUMNS, values, strict=True)))
        return found


def _names(model_input: pd.DataFrame) -> list[str | None]:
    """The name of each row's image; None where there is none."""
    if NAME not in model_input:
        return [None] * len(model_input)
    return [name if isinstance(name, str) and name else None for name in model_input[NAME]]


set_model(ServedDetector())
