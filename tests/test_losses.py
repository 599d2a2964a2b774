import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dskd.config import LossConfig
from dskd.distances import position_distances
from dskd.losses import (
    amplification_loss,
    distillation_loss,
    flattened_loss,
    focal_loss,
    hard_patch_loss,
    position_loss,
)


def random_pair(seed: int = 0, shape: tuple[int, ...] = (3, 5, 4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def random_pyramids(count: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 8, 8), (2, 5, 4, 4), (2, 7, 2, 2))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(count)]


def slow_distances(teacher: Tensor, student: Tensor) -> list[list[float]]:
    """1 - cos by its definition, in double precision: one list of positions per image."""
    images = []
    for a, b in zip(teacher.double().numpy(), student.double().numpy(), strict=True):
        rows, columns = a.shape[1:]
        images.append(
            [
                1 - float(a[:, i, j] @ b[:, i, j]) / float(np.linalg.norm(a[:, i, j]) * np.linalg.norm(b[:, i, j]))
                for i in range(rows)
                for j in range(columns)
            ]
        )
    return images


def test_distances_by_hand() -> None:
    teacher = torch.tensor([[1.0, 3.0, 1.0, 2.0], [0.0, 4.0, 0.0, 0.0]]).reshape(1, 2, 2, 2)
    student = torch.tensor([[2.0, 4.0, 0.0, -1.0], [0.0, 3.0, 5.0, 0.0]]).reshape(1, 2, 2, 2)
    # cos: parallel 1; (3·4 + 4·3) / 25; orthogonal 0; opposite -1
    torch.testing.assert_close(
        position_distances(teacher, student), torch.tensor([[[0.0, 0.04], [1.0, 2.0]]]), rtol=0, atol=1e-6
    )
    assert position_loss(teacher, student).item() == pytest.approx((0 + 0.04 + 1 + 2) / 4)
    # one vector per image: (2 + 12 + 0 - 2 + 0 + 12 + 0 + 0) / (|t| = √31 · |s| = √55)
    assert flattened_loss(teacher, student).item() == pytest.approx(1 - 24 / math.sqrt(31 * 55))
    assert hard_patch_loss(teacher, student, hardest=3, margin=0.5).item() == pytest.approx((1.5 + 0.5 + 0) / 3)


def test_distances_against_a_loop() -> None:
    teacher, student = random_pair()
    expected = slow_distances(teacher, student)
    np.testing.assert_allclose(position_distances(teacher, student).flatten(1).numpy(), expected, atol=1e-6)
    assert position_loss(teacher, student).item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_distance_is_half_the_squared_distance_of_unit_vectors() -> None:
    teacher, student = random_pair()
    units = [x / x.norm(dim=1, keepdim=True) for x in (teacher, student)]
    torch.testing.assert_close(
        position_distances(teacher, student), (units[0] - units[1]).square().sum(dim=1) / 2, rtol=0, atol=1e-6
    )


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    hardest=st.integers(1, 40),
    margin=st.floats(0, 2),
)
def test_hard_patches_against_a_sort(seed: int, hardest: int, margin: float) -> None:
    teacher, student = random_pair(seed)
    worst = [sorted(image, reverse=True)[:hardest] for image in slow_distances(teacher, student)]
    expected = np.mean([np.mean([max(0.0, distance - margin) for distance in image]) for image in worst])
    assert hard_patch_loss(teacher, student, hardest=hardest, margin=margin).item() == pytest.approx(expected, abs=2e-6)


def test_hard_patches_are_chosen_per_image_and_only_they_learn() -> None:
    teacher, student = random_pair()
    student.requires_grad_()
    torch.autograd.backward(hard_patch_loss(teacher, student, hardest=2, margin=0.0))
    assert student.grad is not None
    touched = student.grad.abs().sum(dim=1).flatten(1) > 0
    assert touched.sum(dim=1).tolist() == [2, 2, 2]
    worst = position_distances(teacher, student).flatten(1).topk(2, dim=1).indices
    assert touched.gather(1, worst).all()


def test_patches_within_the_margin_cost_and_teach_nothing() -> None:
    teacher, _ = random_pair()
    student = (teacher + 0.01 * random_pair(1)[0]).requires_grad_()
    loss = hard_patch_loss(teacher, student, hardest=10, margin=0.5)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("loss", [position_loss, flattened_loss])
def test_identical_features_cost_nothing_and_scale_does_not_matter(loss) -> None:  # type: ignore[no-untyped-def]
    teacher, student = random_pair()
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert loss(teacher, 7 * student).item() == pytest.approx(loss(teacher, student).item(), abs=1e-6)
    assert loss(teacher, -teacher).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("zero", ["teacher", "student", "both"])
def test_vectors_of_zeros_have_finite_losses_and_gradients(zero: str) -> None:
    teacher, student = random_pair()
    if zero != "student":
        teacher[:, :, 0] = 0
        teacher[1] = 0
    if zero != "teacher":
        student[:, :, 0] = 0
        student[1] = 0
    student.requires_grad_()
    terms = distillation_loss((teacher,), (student,), (student,), LossConfig(level_weights=(1.0,), hkd_weight=1.0))
    torch.autograd.backward(terms.total)
    assert terms.total.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()
    torch.testing.assert_close(position_distances(teacher, student)[:, 0], torch.ones(3, 6))


def test_halves_are_compared_in_float32() -> None:
    teacher, student = (x.bfloat16() for x in random_pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = distillation_loss((teacher,), (student,), (student,), LossConfig(level_weights=(1.0,), hkd_weight=1.0))
    full = distillation_loss(
        (teacher.float(),), (student.float(),), (student.float(),), LossConfig(level_weights=(1.0,), hkd_weight=1.0)
    )
    assert all(term.dtype == torch.float32 for term in low)
    for one, other in zip(low, full, strict=True):
        assert torch.equal(one, other)


def test_total_by_its_parts() -> None:
    teacher, encoder, decoder = random_pyramids(3)
    weights = (0.5, 0.0, 3.0)
    config = LossConfig(
        level_weights=weights,
        encoder_match="position",
        decoder_match="flattened",
        decoder_weight=0.7,
        hkd_weight=0.3,
        hkd_hardest=3,
        encoder_hkd_margin=0.2,
        decoder_hkd_margin=0.9,
    )

    terms = distillation_loss(teacher, encoder, decoder, config)

    expected_encoder = sum(w * position_loss(t, s) for w, t, s in zip(weights, teacher, encoder, strict=True))
    expected_decoder = sum(w * flattened_loss(t, s) for w, t, s in zip(weights, teacher, decoder, strict=True))
    hard_encoder = sum(
        w * hard_patch_loss(t, s, hardest=3, margin=0.2) for w, t, s in zip(weights, teacher, encoder, strict=True)
    )
    hard_decoder = sum(
        w * hard_patch_loss(t, s, hardest=3, margin=0.9) for w, t, s in zip(weights, teacher, decoder, strict=True)
    )
    torch.testing.assert_close(terms.encoder, expected_encoder)
    torch.testing.assert_close(terms.decoder, expected_decoder)
    torch.testing.assert_close(terms.hard, hard_encoder + 0.7 * hard_decoder)
    torch.testing.assert_close(
        terms.total, expected_encoder + 0.3 * hard_encoder + 0.7 * (expected_decoder + 0.3 * hard_decoder)
    )


def test_each_level_is_told_apart_without_its_weight() -> None:
    teacher, encoder, decoder = random_pyramids(3)
    config = LossConfig(level_weights=(0.5, 0.0, 3.0), encoder_match="position", decoder_match="flattened")
    expected = [[position_loss(*pair).item() for pair in zip(teacher, encoder, strict=True)]]
    expected += [[flattened_loss(*pair).item() for pair in zip(teacher, decoder, strict=True)]]
    assert distillation_loss(teacher, encoder, decoder, config).levels.tolist() == expected
    assert distillation_loss(teacher, None, decoder, config).levels.tolist() == [[0.0] * 3, expected[1]]


def test_a_missing_student_adds_nothing() -> None:
    teacher, student = random_pyramids(2)
    config = LossConfig(encoder_match="flattened", decoder_match="flattened", hkd_weight=1.0)
    alone = distillation_loss(teacher, student, None, config)
    other = distillation_loss(teacher, None, student, config)
    assert alone.decoder.item() == 0 and other.encoder.item() == 0
    assert alone.total.item() == other.total.item() == (alone.encoder + alone.hard).item() > 0


def test_without_hard_patches_their_term_is_zero() -> None:
    teacher, student = random_pyramids(2)
    terms = distillation_loss(teacher, student, None, LossConfig(hkd_weight=0.0))
    assert terms.hard.item() == 0
    assert terms.total.item() == terms.encoder.item()


def test_levels_of_weight_zero_still_have_a_gradient() -> None:
    teacher, student = random_pyramids(2)
    for level in student:
        level.requires_grad_()
    torch.autograd.backward(distillation_loss(teacher, student, None, LossConfig(level_weights=(0.0, 1.0, 0.0))).total)
    assert all(level.grad is not None for level in student)
    assert [bool(level.grad.any()) for level in student if level.grad is not None] == [False, True, False]


def test_pyramids_of_different_depth_are_refused() -> None:
    teacher, student = random_pyramids(2)
    with pytest.raises(ValueError):
        distillation_loss(teacher, student[:2], None, LossConfig())


def test_focal_loss_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = 1e-4 + 0.9998 * torch.rand(2, 3, 4, generator=generator)
    defects = torch.rand(2, 3, 4, generator=generator) < 0.4
    terms = [
        -0.8 * (1 - w) ** 2 * math.log(w) if is_defect else -0.2 * w**2 * math.log(1 - w)
        for w, is_defect in zip(gate.double().flatten().tolist(), defects.flatten().tolist(), strict=True)
    ]
    assert focal_loss(gate, defects).item() == pytest.approx(sum(terms) / 24, rel=1e-5)


@pytest.mark.parametrize("bound", [4.54e-5, 1 - 4.54e-5])
def test_focal_loss_at_the_gates_bounds_is_finite_and_points_the_right_way(bound: float) -> None:
    gate = torch.full((1, 1, 2), bound, requires_grad=True)
    torch.autograd.backward(focal_loss(gate, torch.tensor([[[True, False]]])))
    assert gate.grad is not None and gate.grad.isfinite().all()
    assert gate.grad[0, 0, 0] < 0 < gate.grad[0, 0, 1]


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.5])
def test_amplification_loss_against_a_double_loop(margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    normal, abnormal, amplified = (torch.randn(count, 6, generator=generator) for count in (5, 4, 4))

    def cosine(a: Tensor, b: Tensor) -> float:
        x, y = a.double().numpy(), b.double().numpy()
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    total = 0.0
    for i in range(5):
        for j in range(4):
            wanted = cosine(normal[i], abnormal[j]) - margin
            total += max(0.0, cosine(normal[i], amplified[j]) - wanted)
    found = amplification_loss(normal, abnormal, amplified, margin=margin)
    assert found.item() == pytest.approx(total / 20, rel=1e-5)


def test_unchanged_features_cost_the_margin_and_features_pushed_beyond_it_nothing() -> None:
    normal, abnormal = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert amplification_loss(normal, abnormal, abnormal, margin=0.3).item() == pytest.approx(0.3)
    assert amplification_loss(normal, abnormal, torch.tensor([[0.0, 3.0]]), margin=0.3).item() == 0


@pytest.mark.parametrize(("num_normal", "num_abnormal"), [(0, 3), (3, 0), (0, 0)])
def test_without_pairs_the_amplification_loss_is_zero_with_a_gradient(num_normal: int, num_abnormal: int) -> None:
    amplified = torch.randn(num_abnormal, 4, requires_grad=True)
    loss = amplification_loss(torch.randn(num_normal, 4), torch.randn(num_abnormal, 4), amplified, margin=0.3)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert amplified.grad is not None and not amplified.grad.any()
