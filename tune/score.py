"""Entry: `python tune/score.py DETECTOR --images DIR --out DIR` inspects many images over a Ray cluster."""

import sys
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dskd.arguments import UsageError, deferred, parse_into


def score(
    detector: Positional[Annotated[str, arg(metavar="DETECTOR")]],
    /,
    *,
    images: str,
    out: str,
    false_alarm_rate: float = 0.01,
    overlays: Literal["anomalous", "all", "none"] = "anomalous",
    tracking_uri: str | None = None,
    address: str | None = None,
    batch_size: int = 64,
    concurrency: int | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float | None = None,
    json: bool = False,
) -> None:
    """Inspect every image below a folder, on as many machines as the cluster has.

    OUT receives verdicts/*.parquet, a row per image, overlays/, and last of all summary.json: without it the
    output is unfinished. Exit code 1 says that there are images which could not be read; their rows say why.

    Args:
        detector: Detector folder, s3://…, models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN/detector.
        images: Folder at the same path on every node, or s3://bucket/path, searched for images.
        out: Folder reachable from every node, or s3://bucket/path.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1).
        overlays: Which images are drawn with their heat map and regions.
        tracking_uri: MLflow server of models:/ and runs:/; $MLFLOW_TRACKING_URI unless given.
        address: Ray cluster, auto or ray://…; unless given, the job's cluster or one started for this.
        batch_size: Images that a worker inspects at a time.
        concurrency: Workers; as many as the cluster holds unless given.
        cpus_per_worker: CPUs of a worker.
        gpus_per_worker: GPUs of a worker, fractions allowed; 1 where the cluster has GPUs, else 0, unless given.
        json: Print summary.json on stdout at the end.
    """
    from tune.settings.score import ScoringSettings

    request = ScoringSettings(
        detector=detector,
        images=images,
        out=out,
        false_alarm_rate=false_alarm_rate,
        overlays=overlays,
        tracking_uri=tracking_uri,
        address=address,
        batch_size=batch_size,
        concurrency=concurrency,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
    )
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from tune.jobs.score import launch_scoring

    sys.exit(launch_scoring(request, as_json=json))


def main() -> None:
    """Score as the flags say; bad input ends with one line and exit code 2."""
    try:
        parse_into(deferred(score), sys.argv[1:], prog="tune/score.py")()
    except UsageError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"score: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
