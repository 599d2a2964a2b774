"""The annotations of shapes hold while tests run: conftest.py has jaxtyping check every call."""

import re
from pathlib import Path

import jaxtyping
import pytest
import torch
from conftest import SHAPE_CHECKED

from dskd.anomaly import image_scores
from dskd.losses import focal_loss
from dskd.model.distances import discrepancies, position_distances
from dskd.model.teacher import normalize

ROOT = Path(__file__).resolve().parents[1]


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="student"):
        position_distances(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))  # would broadcast in silence
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        normalize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(jaxtyping.TypeCheckError, match="defects"):
        focal_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(jaxtyping.TypeCheckError, match="maps"):
        image_scores(torch.zeros(4, 4), 0)
    with pytest.raises(jaxtyping.TypeCheckError, match="teacher"):
        discrepancies((torch.zeros(3, 4, 4),), None, None)


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_the_check_the_same_shape_goes_through() -> None:
    assert position_distances(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)).shape == (2, 4, 4)


def test_every_module_with_a_shape_is_checked() -> None:
    for path in sorted((ROOT / "dskd").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if re.search(r"^\s*(from|import) jaxtyping\b", path.read_text(), re.MULTILINE):
            assert any(name == each or name.startswith(f"{each}.") for each in SHAPE_CHECKED), name


def test_what_is_checked_exists() -> None:
    for name in SHAPE_CHECKED:
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
