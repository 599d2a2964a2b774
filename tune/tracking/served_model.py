"""What MLflow serves of a detector: images in, verdicts out.

MLflow runs this file wherever the registered model is loaded, beside the `dskd` that was packed with
it: code and weights as they are, no pickle. It is no module of the search, which only names it.
"""

import base64
import binascii
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dskd.detector import Detector

IMAGE = "image"
FALSE_ALARM_RATE = "false_alarm_rate"


class ServedDetector(PythonModel):
    """A detector behind MLflow's `predict` and `/invocations`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read and verify the packed detector folder."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._detector = Detector.load(Path(context.artifacts["detector"]), device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A row per image of the column `image`, each the base64 text of a PNG, JPEG or other image file.

        The columns are those of `Prediction.to_dict`, with "row 0" and so on for the name of the image. The
        parameter `false_alarm_rate` chooses among the stored thresholds. An image that cannot be read, or is a
        decompression bomb, is an error that names its row, counted from 0; then no row has a verdict.
        """
        threshold = self._detector.threshold(float((params or {}).get(FALSE_ALARM_RATE, 0.01))).value
        rows = []
        with TemporaryDirectory(prefix="dskd-") as temporary:
            paths = []
            for number, text in enumerate(model_input[IMAGE]):
                paths.append(Path(temporary, f"row {number}"))
                paths[-1].write_bytes(_decoded(text, number))
            try:
                for prediction in self._detector.predict(paths, threshold):
                    rows.append(prediction.to_dict(self._detector.record) | {"image": prediction.path.name})
            except ValueError as error:  # names the file, whose folder is nobody's business
                reason = str(error).replace(f"{temporary}/", "")
                raise MlflowException.invalid_parameter_value(reason) from None
        return pd.DataFrame(rows)


def _decoded(text: Any, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise MlflowException.invalid_parameter_value(f"row {number} is not base64 text: {error}") from None


set_model(ServedDetector())
