"""An exported graph with convolutions of 8-bit integers: less exact, and much faster on processors that have them.

Weights and what enters a convolution become 8 bits, by onnxruntime's static quantisation; all between them stays
float32. The ranges come from good images, as they are what a detector sees.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dskd.atomic import file_in_making
from dskd.data.images import Framed
from dskd.data.tiles import cut, some_places, tile_places
from dskd.detector import Detector, inside_of
from dskd.export import DEFAULT_OPSET, INPUT, INSIDE, Parity, build_model, check_exportable, compare

if TYPE_CHECKING:
    import onnx

_IMAGE_CHANNELS = 3
MAX_IMAGES = 64
"""Good images by which the ranges are chosen; more change them little and take time."""


def export_int8(detector: Detector, path: Path, good_images: Sequence[Framed], opset: int = DEFAULT_OPSET) -> Parity:
    """Write the graph to `path`, and tell how far it is from the detector on these images, by which it was made.

    The file as by `export_onnx`, with the same errors but ParityError for what 8 bits change: the caller judges that.
    """
    check_exportable(path, opset)
    model = build_int8_model(detector, good_images, opset)
    parity = compare(detector, model, good_images, tolerance=None)
    with file_in_making(path) as partial:
        partial.write_bytes(model)
    return parity


def build_int8_model(detector: Detector, good_images: Sequence[Framed], opset: int = DEFAULT_OPSET) -> bytes:
    """The graph of `build_model` with convolutions of 8 bits."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._inputs = _inputs(detector, good_images)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._inputs, None)

    exact = build_model(detector, opset)
    with tempfile.TemporaryDirectory() as name:
        plain, prepared, quantized = (Path(name) / f"{part}.onnx" for part in ("plain", "prepared", "quantized"))
        plain.write_bytes(exact.SerializeToString())
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            Images(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=_layers(onnx.load(prepared)),
            extra_options={"TensorQuantOverrides": _image_ranges(onnx.load(prepared), detector, good_images[0])},
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(quantized)
    properties = {entry.key: entry.value for entry in exact.metadata_props}
    onnx.helper.set_model_props(model, properties | {"dskd.precision": "int8"})
    content: bytes = model.SerializeToString()
    return content


def _layers(model: "onnx.ModelProto") -> list[str]:
    """Names of the network's convolutions: all but those that sum over channels, where 8 bits would cost too much."""
    widths = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and widths.get(node.input[1], 1) > 1]


def _image_ranges(model: "onnx.ModelProto", detector: Detector, like: Framed) -> dict[str, list[dict[str, Any]]]:
    """The whole range of pixels, from black to white, for what enters the convolutions that read the image.

    Good images may reach neither; a scratch that is brighter than all of them would be cut down to their brightest.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType

    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    convolutions = (node for node in model.graph.node if node.op_type == "Conv")
    names = sorted({node.input[0] for node in convolutions if shapes.get(node.input[1], (0, 0))[1] == _IMAGE_CHANNELS})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    one = next(_inputs(detector, [like]))
    seen = [session.run(names, one | {INPUT: np.full_like(one[INPUT], value)}) for value in (0, 255)]
    return {
        name: [
            {"rmin": min(each.min() for each in values), "rmax": max(each.max() for each in values),
             "quant_type": QuantType.QUInt8}
        ]
        for name, values in zip(names, zip(*seen, strict=True), strict=True)
    }  # fmt: skip


def _inputs(detector: Detector, images: Sequence[Framed]) -> Iterator[dict[str, Any]]:
    geometry = detector.geometry
    chosen = [images[round(place)] for place in np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES))]
    if geometry.tile:
        places = tile_places([image.frame for image in chosen], geometry)
        for place in some_places(places, MAX_IMAGES, seed=0):
            yield {INPUT: cut(chosen[place.image].rgb, place.top, place.left, geometry.tile)[None]}
        return
    inside = inside_of(chosen, geometry)
    for index, image in enumerate(chosen):
        yield {INPUT: image.rgb[None]} | ({} if inside is None else {INSIDE: inside[index : index + 1]})
