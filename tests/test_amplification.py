import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dskd.model import AmplifiedTeacher, Teacher, build_amplifier, build_teacher, normalize, weights_fingerprint
from dskd.model.amplification import Amplifier, AttributeResidual, LevelAmplifier, ResidualGate, position_code

# Softmax of two groups of equal size whose cosines are 1 and -1, at temperature 0.2.
LOWEST = 1 / (1 + math.exp(10))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher("test_resnet", (1, 2), "random")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return normalize(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0)))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def perceptron(layers: nn.Module, vector: np.ndarray) -> np.ndarray:
    """One position's way through the 1x1 convolutions, in double precision."""
    for layer in layers.children():
        if isinstance(layer, nn.Conv2d):
            weight, bias = (part.detach().double().numpy() for part in layer.parameters())
            vector = weight[:, :, 0, 0] @ vector + bias
        else:
            vector = np.maximum(vector, 0)
    return vector


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_sizes_are_those_of_the_released_network() -> None:
    with torch.device("meta"):
        teacher = build_teacher("wide_resnet50_2.tv_in1k", (1, 2, 3), "random")
        amplifier = build_amplifier(teacher, 50, seed=0)
    assert num_parameters(teacher) == 24_862_528
    assert [f"{num_parameters(level) / 1e6:.2f}" for level in amplifier.levels] == ["1.08", "4.25", "6.40"]
    assert f"{num_parameters(amplifier) / 1e6:.2f}" == "11.73"


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_every_resnet_is_amplified_at_its_own_width(backbone: str) -> None:
    with torch.device("meta"):
        teacher = build_teacher(backbone, (1, 2, 3), "random")
        amplifier = build_amplifier(teacher, 50, seed=0)
        pyramid = teacher(torch.zeros(1, 3, 64, 64))
        assert [level.shape for level in amplifier(pyramid)] == [level.shape for level in pyramid]
    hidden = [next(level.parameters()).shape[0] for level in amplifier.levels]
    memories = {"resnet18": (128, 256, 512), "resnet34": (128, 256, 512), "resnet50": (512, 1024, 1024)}
    first = [level.gate.query[0].out_channels for level in amplifier.levels]  # type: ignore[union-attr, index]
    assert hidden == [100] * 3 and tuple(first) == memories[backbone]


def test_gate_and_amplified_features_against_a_loop() -> None:
    torch.manual_seed(0)
    channels, memory_size, height, width = 8, 3, 2, 3
    level = LevelAmplifier(channels, memory_size)
    features = torch.randn(2, channels, height, width)
    gates = level.gate(features).detach().numpy()
    amplified = level(features).detach().numpy()
    memory = level.gate.memory.detach().double().numpy()
    frequencies = [1e4 ** (-2 * i / 4) for i in range(2)]
    for image, row, column in np.ndindex(2, height, width):
        vector = features[image, :, row, column].double().numpy()
        code = [f(place * freq) for place in (column, row) for freq in frequencies for f in (math.sin, math.cos)]
        query = perceptron(level.gate.query, vector + np.array(code))
        shares = [math.exp(cosine(query, key) / 0.2) for key in memory]
        gate = sum(shares[memory_size:]) / sum(shares)
        assert gates[image, row, column] == pytest.approx(gate, rel=1e-4)
        gains = np.tanh(perceptron(level.residual.gains, vector))
        np.testing.assert_allclose(amplified[image, :, row, column], vector * (1 + gate * gains), rtol=1e-4, atol=1e-6)


def test_position_code_tells_rows_from_columns_and_every_place_from_every_other() -> None:
    code = position_code(torch.zeros(1, 16, 5, 7))
    assert code.shape == (16, 5, 7)
    assert (code[:8] == code[:8, :1]).all() and (code[8:] == code[8:, :, :1]).all()
    assert len(torch.unique(code.flatten(1), dim=1).T) == 35


def test_gates_reach_their_bounds_and_never_leave_them() -> None:
    torch.manual_seed(0)
    gate = ResidualGate(8, 5)
    free = gate(1e3 * torch.randn(4, 8, 6, 6))
    assert free.min() >= 0.999 * LOWEST and free.max() <= 1 - LOWEST + 1e-6
    query = torch.ones(8)
    with torch.no_grad():
        for layer in gate.query.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.zero_()
                layer.bias.copy_(torch.ones_like(layer.bias))  # type: ignore[union-attr, arg-type]
        for sign, bound in ((1, 1 - LOWEST), (-1, LOWEST)):
            gate.memory.copy_(torch.cat([-sign * query.expand(5, 8), sign * query.expand(5, 8)]))
            found = gate(torch.zeros(1, 8, 2, 2))
            torch.testing.assert_close(found, torch.full((1, 2, 2), bound), rtol=1e-3, atol=1e-6)
            assert found.log().isfinite().all() and (1 - found).log().isfinite().all()


def test_a_residual_scales_a_channel_by_at_most_two_and_never_turns_it() -> None:
    torch.manual_seed(0)
    features = 100 * torch.randn(2, 8, 4, 4)
    scaled = features + AttributeResidual(8)(features)
    assert (scaled * features >= 0).all() and (scaled.abs() <= 2 * features.abs()).all()


def test_a_gate_of_zero_leaves_the_features_exactly_as_they_are(
    teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    amplified = AmplifiedTeacher(teacher, build_amplifier(teacher, 5, seed=0))
    changed = zip(teacher(images), amplified(images), strict=True)
    assert not any(torch.equal(plain, level) for plain, level in changed)
    monkeypatch.setattr(ResidualGate, "forward", lambda self, features: torch.zeros_like(features[:, 0]))
    assert all(torch.equal(plain, level) for plain, level in zip(teacher(images), amplified(images), strict=True))


def test_an_amplified_teacher_is_a_teacher(teacher: Teacher, images: Tensor) -> None:
    amplified = AmplifiedTeacher(teacher, build_amplifier(teacher, 5, seed=0))
    assert (amplified.channels, amplified.reductions) == (teacher.channels, teacher.reductions)
    pyramid = amplified.train()(images)
    assert [level.shape for level in pyramid] == [level.shape for level in teacher(images)]
    assert not any(module.training for module in amplified.modules())
    assert not any(level.requires_grad for level in pyramid)
    assert not any(parameter.requires_grad for parameter in amplified.parameters())
    seen = {weights_fingerprint(teacher), weights_fingerprint(amplified)}
    amplified.amplifier.levels[1].gate.memory[0, 0] += 1  # type: ignore[union-attr, index, operator]
    assert len(seen | {weights_fingerprint(amplified)}) == 3


def test_equal_seeds_give_equal_amplifiers_and_leave_the_callers_random_state(teacher: Teacher) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (build_amplifier(teacher, 5, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_channels_without_a_position_code_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4 channels .* got 6") as caught:
        Amplifier((8, 6), 5)
    assert "\n" not in str(caught.value)
