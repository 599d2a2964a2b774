"""The only use of the test images: a finished trial's detector is evaluated and stored as champion."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import ray

from dskd.checkpoint import DetectorRecord
from tune.storage.champions import Champion, save_champion
from tune.storage.files import Storage
from tune.storage.staging import local_copy
from tune.trial.spec import TrialSpec


def save_evaluated_champion(
    storage: Storage, spec: TrialSpec, trial_id: str, detector_uri: str, local: Path
) -> tuple[Champion, DetectorRecord]:
    """Evaluate a trial's detector on the test images, with the resources of a trial, and store it with these figures.

    The detector is also written to the folder `local`.
    """
    evaluation = evaluate_on_test.options(num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker)
    threads = max(1, int(spec.cpus_per_worker))
    tested = ray.get(evaluation.remote(detector_uri, spec.data, spec.category, threads, spec.cache_gb))
    return save_champion(storage, spec.category, trial_id, detector_uri, tested, local)


@ray.remote(max_retries=3)
def evaluate_on_test(
    detector_uri: str, data: str, category: str, num_threads: int, cache_gb: float
) -> Mapping[str, float]:
    """`test/…` figures of a stored detector, computed on the cluster; empty without a usable test split."""
    import torch  # slow import that the driver does not need

    from dskd.detector import Detector

    torch.set_num_threads(num_threads)
    root, _, name = detector_uri.rpartition("/")
    with TemporaryDirectory(prefix="dskd-") as temporary:
        folder = Path(temporary) / "detector"
        Storage(root).download(name, folder)
        detector = Detector.load(folder, "cuda" if torch.cuda.is_available() else "cpu")
        try:
            layout = detector.record.config.data.layout
            scores = detector.evaluate(local_copy(data, category, cache_gb, layout), category)
        except ValueError as error:
            print(f"{category}: no test figures: {error}")  # noqa: T201 - Ray sends it to the driver
            return {}
    return {f"test/{name}": value for name, value in scores._asdict().items()}
