"""MLflow's client: its settings, server checks, and reading runs and artifacts."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import mlflow.artifacts
import sqlalchemy
from mlflow.entities.lifecycle_stage import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from tune.storage.files import check_unlocked, created_by_one
from tune.storage.shown import command, shown, shown_url

EXPERIMENT_KIND, CUSTOM = "mlflow.experimentKind", "custom_model_development"
"""A tag of experiments; without it MLflow opens their page on traces and prompts."""


def prepare_client() -> None:
    """Set environment and log levels of MLflow's client; call it before the first request."""
    # The outbox retries by itself, for longer and without blocking the search.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # MLflow's links would mix with the JSON document on stdout.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # On the tables that a new database gets, on packages of a model: nothing that a user could act on. A database's
    # errors come with a traceback, and are raised too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    for name in ("mlflow.pyfunc", "mlflow.utils.environment", "mlflow.utils.requirements_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.utils.requests_utils").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def check_server(uri: str) -> None:
    """Raise ConnectionError, in one line, if the tracking server does not answer, or has no client here."""
    prepare_client()
    try:
        if is_database(uri) and not uri.startswith("sqlite"):
            _check_database(uri)  # MLflow itself would try for two minutes
        with created_by_one(uri) as place:
            MlflowClient(tracking_uri=place).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        raise ConnectionError(f"MLflow at {shown_url(uri)} does not answer: {first_line(error)}") from None


def check_may_write(uri: str, experiment: str, models: Sequence[str]) -> None:
    """Check that an experiment and registered models that exist can be written to, by writing what they hold already.

    Raises ConnectionError, in one line, if not: another user's, a deleted experiment, a locked database.
    """
    prepare_client()
    where = f"MLflow at {shown_url(uri)}"
    client = registry_client(uri)
    try:
        check_unlocked(uri, "--tracking-uri")
        if (known := client.get_experiment_by_name(experiment)) is not None:
            if known.lifecycle_stage != LifecycleStage.ACTIVE:
                restore = command(["mlflow", "experiments", "restore", "--experiment-id", str(known.experiment_id)])
                raise ConnectionError(
                    f"the experiment {experiment!r} of {where} was deleted; restore it ({restore}), or give another "
                    "--name."
                )
            kind = known.tags.get(EXPERIMENT_KIND, CUSTOM)
            client.set_experiment_tag(known.experiment_id, EXPERIMENT_KIND, kind)
        for model in models:
            if (description := _description(client, model)) is not None:
                client.update_registered_model(model, description)
    except MlflowException as error:
        raise ConnectionError(f"{where} does not let this search write: {first_line(error)}") from None


def _description(client: MlflowClient, model: str) -> str | None:
    """The description of a registered model; None if there is none of that name."""
    try:
        return str(client.get_registered_model(model).description or "")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def is_database(uri: str) -> bool:
    """Whether MLflow writes to a database itself, without a server between."""
    return uri.partition("://")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _check_database(uri: str) -> None:
    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def embedded_tracking(storage: str, wanted_for: str) -> str:
    """URI of the MLflow file that a local search writes in its storage folder.

    Raises ValueError, which names what it is `wanted_for`, if there is none.
    """
    file = Path(storage).absolute() / "mlflow.db"
    if "://" in storage or not file.is_file():
        raise ValueError(f"{wanted_for} needs --tracking-uri or $MLFLOW_TRACKING_URI: there is no {file}.")
    return f"sqlite:///{file}"


def registry_client(uri: str) -> MlflowClient:
    """A client for the registered models of the tracking server."""
    prepare_client()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def first_line(error: Exception) -> str:
    """First line of an error, at most 300 characters, without the credentials that MLflow's errors may repeat."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def tracking_ui_command(uri: str) -> str:
    """Command or address that shows the runs."""
    if uri.startswith(("http://", "https://")):
        return f"open {shown_url(uri)}"
    return command(["mlflow", "ui", "--backend-store-uri", shown_url(uri)])


def run_link(uri: str, run_id: str) -> str:
    """Address of a run's page on a tracking server; the run's id if the URI is no server."""
    if not run_id or not uri.startswith(("http://", "https://")):
        return run_id
    experiment = MlflowClient(tracking_uri=uri).get_run(run_id).info.experiment_id
    return f"{shown_url(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def params_and_tags(uri: str, run_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters and tags of a run, as texts.

    Raises ValueError on an unknown run, ConnectionError if the server does not answer.
    """
    check_server(uri)
    try:
        run = MlflowClient(tracking_uri=uri).get_run(run_id)
    except MlflowException as error:
        reason = first_line(error)
        raise ValueError(f"no run {run_id!r} in MLflow at {shown_url(uri)}: {reason}") from None
    return dict(run.data.params), dict(run.data.tags)


def download(artifact_uri: str, uri: str, folder: Path) -> None:
    """Download the artifacts of a models:/ or runs:/ address to a local folder.

    Raises ValueError if there are none, ConnectionError if the server does not answer.
    """
    check_server(uri)
    # A progress bar per file would fill a job's log.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        place = _place_of(MlflowClient(tracking_uri=uri, registry_uri=uri), artifact_uri)
        mlflow.artifacts.download_artifacts(place, dst_path=str(folder), tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        reason = first_line(error)
        raise ValueError(f"{artifact_uri} cannot be downloaded from MLflow at {shown_url(uri)}: {reason}") from None


def _place_of(client: MlflowClient, artifact_uri: str) -> str:
    """Artifact address of a model version; MLflow itself would look in the registry of the process's environment."""
    if not artifact_uri.startswith("models:/"):
        return artifact_uri
    name, _, alias = artifact_uri.removeprefix("models:/").partition("@")
    if alias:
        version = str(client.get_model_version_by_alias(name, alias).version)
    else:
        name, _, version = name.rpartition("/")
    place: str = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):  # a logged model's id
        place = client.get_logged_model(place.removeprefix("models:/")).artifact_location
    return place
