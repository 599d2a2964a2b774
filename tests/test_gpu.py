"""What only a GPU can show; skipped where there is none. From a bare copy: `pytest --noconftest tests/test_gpu.py`."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from dskd.config import Precision
from dskd.device import computing_device, resident, to_device
from dskd.evaluate import inspect_images, score_images
from dskd.model import build_students, build_teacher
from dskd.model.features import feature_table
from dskd.model.frozen import FrozenNetworks
from dskd.presets import PRESETS
from dskd.training.loop import Interval, Step, TakeStep, build_optimizer, fit, plain_step
from dskd.training.recorded import RecordedSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
SIZE = 64


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def gpu() -> torch.device:
    return computing_device("cuda")


@pytest.mark.parametrize("preset", ["dskd", "stfpm", "rd4ad"])
def test_recorded_steps_train_like_single_ones(gpu: torch.device, preset: str) -> None:
    config = PRESETS[preset].with_values({"image_size": SIZE, "batch_size": 4, "steps": 40, "hkd_weight": 0.5})
    images = pictures(12)
    teacher = build_teacher(config.model.backbone, config.model.levels, "random").to(gpu)
    table = feature_table(teacher, images, gpu)
    start = build_students(config.model, teacher, seed=0).to(gpu)

    def trained(take_step: TakeStep) -> tuple[list[float], list[torch.Tensor]]:
        students = copy.deepcopy(start)
        optimizer = build_optimizer(students, config.train)
        steps = list(fit(students, optimizer, images, table, config, device=gpu, take_step=take_step))
        assert sum(isinstance(each, Interval) for each in steps) > 1  # one recording serves all intervals
        return [each.loss.item() for each in steps if isinstance(each, Step)], list(students.parameters())

    recorded = RecordedSteps()
    (expected, weights), (found, others) = trained(plain_step), trained(recorded)
    assert recorded.is_recorded
    assert found[:8] == pytest.approx(expected[:8], rel=1e-3)  # bfloat16 rounds, and later steps build on it
    assert found == pytest.approx(expected, rel=0.05)
    assert any(one > other for one, other in pairwise(found))  # the losses of different batches, not of one again
    assert all(torch.isfinite(weight).all() for weight in (*weights, *others))


def test_data_on_the_gpu_is_chosen_there(gpu: torch.device) -> None:
    images = pictures(9)
    images.flags.writeable = False
    there = resident(gpu, images)
    assert isinstance(there, torch.Tensor) and there.is_cuda
    chosen = np.array([7, 0, 3])
    np.testing.assert_array_equal(to_device(gpu, there, chosen).cpu().numpy(), images[chosen])


@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 1e-5), ("tf32", 5e-3), ("float16", 5e-3), ("bfloat16", 5e-2)]
)
def test_recorded_inspections_see_what_a_cpu_sees(gpu: torch.device, precision: Precision, error: float) -> None:
    config = PRESETS["dskd"].with_values({"image_size": SIZE})
    images = pictures(70)  # a full batch, and one that is filled up
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    students = build_students(config.model, teacher, seed=0).eval()
    expected = score_images(teacher, students, images, config, CPU)
    networks = FrozenNetworks.folded(teacher.to(gpu), students.to(gpu), 64, precision)
    for count in (70, 3, 1):
        seen = inspect_images(networks, images[:count], config, gpu)
        np.testing.assert_allclose(seen.maps, expected.maps[:count], rtol=0, atol=error * expected.maps.max())
        np.testing.assert_allclose(seen.scores, expected.scores[:count], rtol=error)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one_sees_the_same() -> None:
    config = PRESETS["stfpm"].with_values({"image_size": SIZE})
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    students = build_students(config.model, teacher, seed=0).eval()
    images, second = pictures(6), computing_device("cuda:1")
    expected = score_images(teacher, students, images, config, CPU)
    networks = FrozenNetworks.folded(teacher.to(second), students.to(second), 64)
    for _ in range(2):  # recorded, and replayed
        seen = inspect_images(networks, images, config, second)
        np.testing.assert_allclose(seen.maps, expected.maps, rtol=0, atol=1e-5 * expected.maps.max())
