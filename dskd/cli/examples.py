"""Examples at the end of each command's help; a test runs them in this order, on small drawn images."""

from collections.abc import Mapping, Sequence

EXAMPLES: Mapping[str, Sequence[str]] = {
    "demo-data": ("dskd demo-data my-images",),
    "check-data": ("dskd check-data my-images", "dskd check-data my-images --image-size 128 --no-time --json"),
    "train": (
        "dskd train --data my-images --category flange --out detectors/flange",
        "dskd train --data my-images --category fabric --preset stfpm --image-size 128 --out detectors/fabric",
    ),
    "evaluate": (
        "dskd evaluate detectors/flange --data my-images",
        "dskd evaluate detectors/flange --data my-images --false-alarm-rate 0.05 --json",
    ),
    "predict": (
        "dskd predict detectors/flange my-images/flange/test --out verdicts",
        "dskd predict detectors/flange part.png --false-alarm-rate 0.05 --out verdict",
    ),
    "compare": ("dskd compare detectors/flange detectors/fabric my-images/flange/test --out compared",),
    "feedback": (
        "dskd feedback detectors/flange --good my-images/flange/test/good --defect my-images/flange/test/chip",
        "dskd feedback detectors/flange --approve",
    ),
    "page": ("dskd page detectors/flange detectors/fabric",),
    "export": ("dskd export detectors/flange --onnx flange.onnx --images my-images/flange/test",),
    "report": ("dskd report dskd-results/parts/report.json --out report.html",),
}
