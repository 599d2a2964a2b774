"""Entry: `python tune/train.py --data DIR --category C --to DIR` trains one detector, locally or as a Ray job."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from dskd.arguments import ConfigSource, UsageError, deferred, parse_into, parse_known
from dskd.config import RunConfig
from dskd.presets import Preset
from tune.jobs.train import differences, teacher_weights_of
from tune.storage.uris import LOCAL_RESULTS
from tune.tracking.runs import tracked_run, tracking_store


def train(
    *,
    data: str,
    to: Path,
    settings: Annotated[RunConfig, OmitArgPrefixes],
    category: str | None = None,
    name: str = "train",
    config: Path | None = None,
    preset: Preset = "dskd",
    from_run: str | None = None,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    teacher_weights: str | None = None,
    storage: str = LOCAL_RESULTS,
    tracking_uri: str | None = None,
    address: str | None = None,
    cache_gb: float = 20.0,
    json: bool = False,
) -> None:
    """Train a detector with a known configuration on a Ray cluster, tracked in MLflow, and download_detector it.

    The same command again goes on where a killed one stopped, and delivers again what is finished. Exit code 1
    says that the training failed.

    Args:
        data: Folder of categories at the same path on every node, or s3://bucket/path.
        to: Folder that receives the detector.
        settings: What the run is.
        category: Which category; may be left out where the data hold one, or with --from-run.
        name: Name of the MLflow experiment, and of a folder in the storage.
        config: TOML file of the fields below, as dskd train --print-config writes it; flags stand above it.
        preset: Method whose configuration the file and the other flags change.
        from_run: MLflow run to repeat, a trial or a training: its configuration, category and teacher.
        workers: Processes that train together (DDP), on several nodes where needed.
        gpus_per_worker: GPUs of a worker, fractions allowed; 1 where the cluster has GPUs, else 0, unless given.
        cpus_per_worker: CPUs of a worker.
        teacher_weights: hub, a .safetensors or .pth file at the same path on every node, or random (wiring tests);
            hub, or as the repeated run, unless given.
        storage: Folder or s3://bucket/path for checkpoints and detectors; reachable from every node.
        tracking_uri: MLflow server; unless given, $MLFLOW_TRACKING_URI, or an SQLite file in a local storage folder.
        address: Ray cluster, auto or ray://…; unless given, the job's cluster or one started for this training.
        cache_gb: Size in GB of a node's cache, and once more of its copies of data from s3://.
        json: Print one JSON document on stdout at the end.
    """
    from tune.settings.train import TrainingSettings

    repeated = tracked_run(tracking_store(tracking_uri, storage), from_run) if from_run else None
    request = TrainingSettings(
        config=settings,
        data=data,
        category=category or (repeated.category if repeated else None),
        to=to,
        name=name,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        cpus_per_worker=cpus_per_worker,
        teacher_weights=teacher_weights_of(teacher_weights, repeated),
        storage=storage,
        tracking_uri=tracking_uri,
        address=address,
        cache_gb=cache_gb,
        repeats=repeated.run_id if repeated else "",
        expected_data_sha256=repeated.data_sha256 if repeated else "",
    )
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.train import launch_training
    from tune.tracking.runs import code_revision

    if repeated:
        for line in differences(repeated, request.config, request.teacher_weights, code_revision()):
            print(line, file=sys.stderr)  # noqa: T201
    sys.exit(launch_training(request, as_json=json))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Defaults(ConfigSource):
    """The flags that decide what the flags of the configuration are unless given."""

    from_run: str | None = None
    tracking_uri: str | None = None
    storage: str | None = None


def _config_of(arguments: Sequence[str]) -> RunConfig:
    """What the flags of the configuration stand at unless given: the run's to repeat, or the preset's or file's."""
    chosen = parse_known(_Defaults, arguments, prog="tune/train.py")
    if chosen.from_run is None or not {"-h", "--help"}.isdisjoint(arguments):
        return chosen.read()
    if other := [flag for flag in ("preset", "config") if getattr(chosen, flag) is not None]:
        raise ValueError(f"--from-run and --{other[0]} exclude each other: both say what the configuration is.")
    return tracked_run(tracking_store(chosen.tracking_uri, chosen.storage), chosen.from_run).config


def main() -> None:
    """Train as the flags say; bad input ends with one line and exit code 2."""
    try:
        command = functools.partial(train, settings=_config_of(sys.argv[1:]))
        parse_into(deferred(command), sys.argv[1:], prog="tune/train.py")()
    except UsageError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"train: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
