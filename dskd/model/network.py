"""The students and their embedding, connected as the configuration says."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dskd.config import ModelConfig
from dskd.model.distances import Pyramid
from dskd.model.embedding import DeepFeatureEmbedding
from dskd.model.seeding import seeded
from dskd.model.students import StudentDecoder, StudentEncoder, block_style
from dskd.model.teacher import Teacher, negative_levels


class StudentPyramids(NamedTuple):
    """The students' pyramids of a batch; None for a student that the configuration leaves out."""

    encoder: Pyramid | None
    decoder: Pyramid | None


class Students(nn.Module):
    """Everything that is trained: student encoder, embedding, student decoder.

    STFPM (only the encoder), RD4AD (only the decoder, on the teacher's features) and DSKD (the decoder on the
    encoder's features) are different combinations of these parts.
    """

    def __init__(self, config: ModelConfig, teacher: Teacher) -> None:
        super().__init__()
        self.decoder_input = config.decoder_input
        self.detach_embedding = config.detach_embedding
        self.image_multiple = 2 * teacher.reductions[-1]
        self.encoder = StudentEncoder(config.backbone, config.levels) if config.student_encoder else None
        self.embedding: DeepFeatureEmbedding | None = None
        self.decoder: StudentDecoder | None = None
        if config.student_decoder:
            style = block_style(teacher.features, config.levels)
            self.embedding = DeepFeatureEmbedding(
                teacher.channels,
                teacher.reductions,
                config.embedding_depth,
                style.bottleneck,
                num_sources=2 if config.decoder_input == "student+teacher" else 1,
            )
            linear = (config.decoder_output == "linear",) * len(config.levels)
            if config.decoder_output == "auto":
                linear = negative_levels(teacher, config.backbone)
            self.decoder = StudentDecoder(
                self.embedding.out_channels, teacher.channels, teacher.reductions, style, linear
            )

    def forward(self, images: Float[Tensor, "b 3 height width"], teacher_pyramid: Pyramid) -> StudentPyramids:
        """Each student's pyramid, shaped as the teacher's; `images` come from `normalize`.

        Raises ValueError if the embedding and the decoder cannot exactly halve and double the size of the images.
        """
        encoded = None if self.encoder is None else self.encoder(images)
        if self.embedding is None or self.decoder is None:
            return StudentPyramids(encoded, None)
        if any(side % self.image_multiple for side in images.shape[-2:]):
            raise ValueError(
                f"image sides must be multiples of {self.image_multiple} for a decoder of these levels, "
                f"got {tuple(images.shape[-2:])}; change image_size or levels."
            )
        source = teacher_pyramid
        if self.decoder_input != "teacher":
            assert encoded is not None  # the configuration refuses a decoder without an input
            source = encoded
            if self.decoder_input == "student+teacher":
                source = tuple(torch.cat(levels, dim=1) for levels in zip(encoded, teacher_pyramid, strict=True))
        if self.detach_embedding:
            source = tuple(level.detach() for level in source)
        return StudentPyramids(encoded, self.decoder(self.embedding(source)))


def build_students(config: ModelConfig, teacher: Teacher, seed: int) -> Students:
    """Untrained students for `teacher`; equal seeds give equal weights, on any machine.

    Convolutions are initialised as in He et al., arXiv 1502.01852, for ReLU and fan-out, BatchNorm as the
    identity, and transposed convolutions by torch's default, as in the code of STFPM and RD4AD.
    The caller's random state is not changed. Weights are in torch.channels_last order, like the images from
    `normalize`: safetensors needs them contiguous.
    """
    with seeded(seed):
        students = Students(config, teacher)
        for module in students.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    return students.to(memory_format=torch.channels_last)
