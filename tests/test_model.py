import re
import socket
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dskd.config import ModelConfig
from dskd.model import (
    DeepFeatureEmbedding,
    StudentDecoder,
    StudentEncoder,
    Students,
    Teacher,
    TeacherUnavailableError,
    build_students,
    build_teacher,
    normalize,
    weights_fingerprint,
)
from dskd.model.students import BlockStyle, level_halvings

RESNET18 = "resnet18.tv_in1k"
WIDE_RESNET50 = "wide_resnet50_2.tv_in1k"

WIRINGS = {
    "dskd": ModelConfig(),
    "dskd, detached": ModelConfig(detach_embedding=True),
    "dskd, fed by the teacher": ModelConfig(decoder_input="teacher"),
    "dskd, fed by both": ModelConfig(decoder_input="student+teacher"),
    "stfpm": ModelConfig(student_decoder=False),
    "rd4ad": ModelConfig(student_encoder=False, decoder_input="teacher"),
    "deep embedding": ModelConfig(embedding_depth=4),
    "two levels": ModelConfig(levels=(2, 3)),
    "levels a factor of 4 apart": ModelConfig(levels=(1, 3)),
    "one level": ModelConfig(levels=(2,)),
    "a family that timm does not cut": ModelConfig(backbone="mobilenetv3_small_050"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks on tiny images spend more on handing work to threads than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher(RESNET18, (1, 2, 3), "random")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return normalize(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0)))


@pytest.fixture(scope="module")
def torchvision_resnet() -> torchvision.models.ResNet:
    network = torchvision.models.resnet18(weights=None)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that a forgotten buffer would show
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total(pyramid: tuple[Tensor, ...] | None) -> Tensor:
    assert pyramid is not None
    return torch.stack([level.square().mean() for level in pyramid]).sum()


# Teacher


def test_normalize_agrees_with_torchvision() -> None:
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(
        pixels.permute(0, 3, 1, 2) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(normalize(pixels), expected)


@pytest.mark.parametrize("name", ["classifier.pth", "classifier.safetensors"])
def test_teacher_from_a_full_classifier_gives_its_first_stages(
    name: str, tmp_path: Path, torchvision_resnet: torchvision.models.ResNet, images: Tensor
) -> None:
    path = tmp_path / name
    state = torchvision_resnet.state_dict()
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    net = torchvision_resnet
    with torch.no_grad():
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        first = net.layer1(stem)
        second = net.layer2(first)
        third = net.layer3(second)

    teacher = build_teacher(RESNET18, (1, 2, 3), str(path))

    for level, expected in zip(teacher(images), (first, second, third), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    assert teacher.channels == (64, 128, 256)
    assert teacher.reductions == (4, 8, 16)
    assert num_parameters(teacher) == 2_782_784


def test_teacher_accepts_a_checkpoint_without_batchnorm_counters(
    tmp_path: Path, torchvision_resnet: torchvision.models.ResNet
) -> None:
    state = torchvision_resnet.state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "old.pth")
    teacher = build_teacher(RESNET18, (1, 2, 3), str(tmp_path / "old.pth"))
    assert torch.equal(teacher.state_dict()["features.bn1.running_mean"], state["bn1.running_mean"])


def test_teacher_accepts_the_full_models_spelling_of_a_family_that_timm_renames(tmp_path: Path) -> None:
    renamed = build_teacher("convnext_atto", (0, 1), "random").features.state_dict()
    given = {re.sub(r"^(stem|stages)_(\d)", r"\1.\2", name): value + 1 for name, value in renamed.items()}
    assert given.keys() != renamed.keys()
    torch.save(given, tmp_path / "convnext.pth")
    teacher = build_teacher("convnext_atto", (0, 1), str(tmp_path / "convnext.pth"))
    for name, value in teacher.features.state_dict().items():
        assert torch.equal(value, renamed[name] + 1)


def test_teacher_never_leaves_eval_and_never_changes(teacher: Teacher, images: Tensor) -> None:
    before = weights_fingerprint(teacher)
    container = nn.ModuleList([teacher]).train()
    pyramid = teacher.train()(images)
    assert container.training
    assert not any(module.training for module in teacher.modules())
    assert not any(level.requires_grad for level in pyramid)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert weights_fingerprint(teacher) == before


def test_random_teacher_is_the_same_every_time_and_leaves_the_callers_random_state() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_teacher(RESNET18, (1,), "random")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert weights_fingerprint(first) == weights_fingerprint(build_teacher(RESNET18, (1,), "random"))


def test_fingerprint_sees_every_tensor() -> None:
    teacher = build_teacher(RESNET18, (1,), "random")
    seen = {weights_fingerprint(teacher)}
    for tensor in teacher.state_dict().values():
        tensor.view(-1)[0] += 1
        seen.add(weights_fingerprint(teacher))
    assert len(seen) == 1 + len(teacher.state_dict())
    assert all(re.fullmatch("[0-9a-f]{64}", fingerprint) for fingerprint in seen)


def test_fingerprint_of_another_precision_or_memory_order(teacher: Teacher) -> None:
    before = weights_fingerprint(teacher)
    other = build_teacher(RESNET18, (1, 2, 3), "random").to(memory_format=torch.channels_last)
    assert weights_fingerprint(other) == before
    assert weights_fingerprint(other.bfloat16()) != before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "lack 'bn1.weight'"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"'conv1.weight' must have shape \(64, 3, 7, 7\), got"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "must map parameter names to tensors"),
        (torch.zeros(3), "must map parameter names to tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: object, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as caught:
        build_teacher(RESNET18, (1, 2, 3), str(tmp_path / "weights.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not weights", b"PK\x03\x04 cut", b"\x80\x02", b"\x80\x02M", struct.pack("<Q", 1 << 60) + b"{}"],
)
def test_unreadable_weights_are_refused_in_one_line(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable state dict") as caught:
        build_teacher(RESNET18, (1, 2, 3), str(path))
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"conv1.weight": Attack()}, tmp_path / "weights.pth")
    assert zipfile.is_zipfile(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not a readable state dict"):
        build_teacher(RESNET18, (1, 2, 3), str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nothing.pth", "."])
def test_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'hub', 'lite0', 'random' or an existing"):
        build_teacher(RESNET18, (1, 2, 3), str(tmp_path / name))


@pytest.mark.parametrize(
    ("backbone", "levels", "message"),
    [
        ("resnet1", (1, 2, 3), "'resnet1'"),
        ("resnet18.of_my_own", (1, 2, 3), "'resnet18.of_my_own'"),
        (RESNET18, (3, 9), r"got \(3, 9\)"),
        ("swin_tiny_patch4_window7_224", (0, 1), "channels first"),
    ],
)
def test_unknown_backbones_and_levels_are_refused(backbone: str, levels: tuple[int, ...], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_teacher(backbone, levels, "random")


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty local cache, and a hub at a port of this machine where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_an_unreachable_hub_is_one_line_that_says_what_to_do(unreachable_hub: Path) -> None:
    with pytest.raises(TeacherUnavailableError, match=r"--teacher-weights FILE.*random") as caught:
        build_teacher(RESNET18, (1, 2, 3), "hub")
    assert "\n" not in str(caught.value)


def test_weights_in_the_hubs_cache_need_no_hub(
    unreachable_hub: Path, torchvision_resnet: torchvision.models.ResNet
) -> None:
    model = unreachable_hub / "models--timm--resnet18.tv_in1k"
    for folder in ("refs", "snapshots/0123"):
        (model / folder).mkdir(parents=True)
    (model / "refs/main").write_text("0123")
    state = torchvision_resnet.state_dict()
    safetensors.torch.save_file(state, model / "snapshots/0123/model.safetensors")

    loaded = build_teacher(RESNET18, (1, 2, 3), "hub").features.state_dict()

    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_a_hub_teacher_needs_weights_on_the_hub(unreachable_hub: Path) -> None:
    with pytest.raises(ValueError, match="weights on the hub, got 'resnet1'"):
        build_teacher("resnet1", (1, 2, 3), "hub")


# Students


@pytest.mark.parametrize(
    ("backbone", "depth", "encoder", "embedding", "decoder"),
    # Measured on the official networks: the 1x1 convolution that they declare and never call left out.
    [(RESNET18, 2, "2.78", "11.68", "3.70"), (WIDE_RESNET50, 3, "24.86", "58.89", "24.92")],
)
def test_sizes_are_those_of_the_published_networks(
    backbone: str, depth: int, encoder: str, embedding: str, decoder: str
) -> None:
    config = ModelConfig(backbone=backbone, embedding_depth=depth, decoder_output="relu")
    with torch.device("meta"):
        students = build_students(config, build_teacher(backbone, config.levels, "random"), seed=0)
    parts = (students.encoder, students.embedding, students.decoder)
    assert [f"{num_parameters(part) / 1e6:.2f}" for part in parts if part is not None] == [
        encoder,
        embedding,
        decoder,
    ]


def test_decoder_keeps_the_teachers_numbers_of_blocks_in_their_order() -> None:
    config = ModelConfig(backbone=WIDE_RESNET50, decoder_output="relu")
    with torch.device("meta"):
        students = Students(config, build_teacher(WIDE_RESNET50, (1, 2, 3), "random"))
    assert students.decoder is not None
    assert [len(list(stage.children())) for stage in students.decoder.stages] == [3, 4, 6]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_student_answers_in_the_teachers_shapes_and_trains_every_parameter(wiring: str, images: Tensor) -> None:
    config = WIRINGS[wiring]
    teacher = build_teacher(config.backbone, config.levels, "random")
    students = build_students(config, teacher, seed=0)
    pyramid = teacher(images)

    answers = students(images, pyramid)

    assert (answers.encoder is not None) == config.student_encoder
    assert (answers.decoder is not None) == config.student_decoder
    present = [answer for answer in answers if answer is not None]
    for answer in present:
        assert [level.shape for level in answer] == [level.shape for level in pyramid]
    torch.autograd.backward(torch.stack([total(answer) for answer in present]).sum())
    trained = [parameter for parameter in students.parameters() if parameter.requires_grad]
    assert len(trained) > 10
    assert all(parameter.grad is not None for parameter in trained)


def test_students_run_in_ddp(teacher: Teacher, images: Tensor, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        students = DistributedDataParallel(build_students(ModelConfig(), teacher, seed=0))
        for _ in range(2):  # DDP complains about an unused parameter at the second step
            answers = students(images, teacher(images))
            torch.autograd.backward(total(answers.encoder) + total(answers.decoder))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wiring", "reaches"),
    [("dskd", True), ("dskd, detached", False), ("dskd, fed by the teacher", False), ("dskd, fed by both", True)],
)
def test_the_decoders_gradient_reaches_the_encoder_only_where_it_should(
    wiring: str, reaches: bool, teacher: Teacher, images: Tensor
) -> None:
    students = build_students(WIRINGS[wiring], teacher, seed=0)
    torch.autograd.backward(total(students(images, teacher(images)).decoder))
    assert students.encoder is not None and students.embedding is not None
    assert any(parameter.grad is not None for parameter in students.encoder.parameters()) == reaches
    assert all(parameter.grad is not None for parameter in students.embedding.parameters())


@pytest.mark.parametrize(
    ("wiring", "depends"), [("dskd", False), ("dskd, fed by the teacher", True), ("dskd, fed by both", True)]
)
def test_the_decoder_reads_the_pyramid_that_the_configuration_names(
    wiring: str, depends: bool, teacher: Teacher, images: Tensor
) -> None:
    students = build_students(WIRINGS[wiring], teacher, seed=0).eval()
    pyramid = teacher(images)
    other = tuple(level.flip(0) for level in pyramid)
    first, second = (students(images, source).decoder for source in (pyramid, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) != depends


def test_students_hold_only_what_the_wiring_needs(teacher: Teacher) -> None:
    encoder_only = build_students(WIRINGS["stfpm"], teacher, seed=0)
    assert all(name.startswith("encoder.") for name in encoder_only.state_dict())
    assert not any("layer4" in name or "fc" in name for name in encoder_only.state_dict())
    decoder_only = build_students(WIRINGS["rd4ad"], teacher, seed=0)
    assert {name.split(".")[0] for name in decoder_only.state_dict()} == {"embedding", "decoder"}


def test_decoder_features_are_non_negative_like_the_targets(teacher: Teacher, images: Tensor) -> None:
    answers = build_students(WIRINGS["rd4ad"], teacher, seed=0)(images, teacher(images))
    assert all((level >= 0).all() and (level > 0).any() for level in answers.decoder)


def test_equal_seeds_give_equal_students_and_leave_the_callers_random_state(teacher: Teacher) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = build_students(ModelConfig(), teacher, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = build_students(ModelConfig(), teacher, seed=3).state_dict()
    other = build_students(ModelConfig(), teacher, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    differing = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert differing == {name for name, value in first.items() if value.ndim == 4}


def test_convolutions_start_with_fan_out_variance_and_batchnorm_as_identity(teacher: Teacher) -> None:
    students = build_students(ModelConfig(), teacher, seed=0)
    for module in students.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_an_image_that_cannot_be_halved_for_the_decoder_is_refused(teacher: Teacher) -> None:
    images = torch.zeros(1, 3, 48, 64)
    students = build_students(ModelConfig(), teacher, seed=0)
    with pytest.raises(ValueError, match=r"multiples of 32 .* got \(48, 64\)"):
        students(images, teacher(images))


def test_levels_of_equal_resolution_are_condensed_and_restored() -> None:
    embedding = DeepFeatureEmbedding((8, 8), (16, 16), depth=1, bottleneck=None)
    decoder = StudentDecoder(embedding.out_channels, (8, 8), (16, 16), BlockStyle(None, (2, 2)))
    restored = decoder(embedding((torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4))))
    assert [level.shape for level in restored] == [(2, 8, 4, 4), (2, 8, 4, 4)]


def test_level_halvings() -> None:
    assert level_halvings((4, 8, 32, 32)) == (1, 2, 0)
    for reductions in ((4, 12), (4, 6), (8, 4)):
        with pytest.raises(ValueError, match="halve the resolution"):
            level_halvings(reductions)


def test_student_encoder_has_no_pretrained_stage(teacher: Teacher) -> None:
    encoder = StudentEncoder(RESNET18, (1, 2, 3))
    assert encoder.features.state_dict().keys() == teacher.features.state_dict().keys()


def test_students_that_are_built_in_several_threads_have_the_weights_of_their_seeds() -> None:
    model, seeds = ModelConfig(backbone="test_resnet", levels=(1, 2), embedding_depth=1), range(6)
    taught = build_teacher(model.backbone, model.levels, "random")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: build_students(model, taught, seed), seeds))
    for seed, students in zip(seeds, found, strict=True):
        expected = build_students(model, taught, seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in students.state_dict().items())
