"""MLflow's client: its settings, checks of a server, and what is read from it."""

import logging
import os
import re
from pathlib import Path

import mlflow.artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient


def prepare_client() -> None:
    """Settings of MLflow's client that must be in place before its first request."""
    # The writer tries again by itself, for longer and without blocking anyone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # Its links would mix with the one JSON document on stdout.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.pyfunc", "mlflow.utils.environment", "mlflow.utils.requirements_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.utils.requests_utils").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def check_server(uri: str) -> None:
    """Raise ConnectionError, in one line, where the tracking server does not answer."""
    prepare_client()
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except MlflowException as error:
        reason = first_line(error)
        raise ConnectionError(f"MLflow at {without_password(uri)} does not answer: {reason}") from None


def registry_client(uri: str) -> MlflowClient:
    """A client of the tracking server's registered models."""
    prepare_client()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def without_password(uri: str) -> str:
    """The URI without its user and password, fit for a log."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if "@" in rest else uri


def first_line(error: Exception) -> str:
    """What an error says; MLflow's repeat the server's address, here without a password in it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return without_passwords(line)[:300]


def without_passwords(text: str) -> str:
    """An error's text fit for a log: every address in it without its user and password."""
    return re.sub(r"://[^/\s]*@", "://", text)


def tracking_ui_command(uri: str) -> str:
    """What a person types to see the runs."""
    if uri.startswith(("http://", "https://")):
        return f"open {without_password(uri)}"
    return f"mlflow ui --backend-store-uri {without_password(uri)}"


def run_link(uri: str, run_id: str) -> str:
    """Address of a run's page on a tracking server; the run's id where there is no such server."""
    if not run_id or not uri.startswith(("http://", "https://")):
        return run_id
    experiment = MlflowClient(tracking_uri=uri).get_run(run_id).info.experiment_id
    return f"{without_password(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def params_and_tags(uri: str, run_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a tracked run was given, as the texts that MLflow keeps.

    Raises ValueError on an unknown run, ConnectionError where the server does not answer.
    """
    check_server(uri)
    try:
        run = MlflowClient(tracking_uri=uri).get_run(run_id)
    except MlflowException as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"no run {run_id!r} in MLflow at {without_password(uri)}: {reason}") from None
    return dict(run.data.params), dict(run.data.tags)


def download(artifact_uri: str, uri: str, folder: Path) -> None:
    """Put what a models:/ or runs:/ address names into a local folder.

    Raises ValueError where there is nothing, ConnectionError where the server does not answer.
    """
    check_server(uri)
    # A bar for every file would fill a job's log.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        place = _place_of(MlflowClient(tracking_uri=uri, registry_uri=uri), artifact_uri)
        mlflow.artifacts.download_artifacts(place, dst_path=str(folder), tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        raise ValueError(f"{artifact_uri} cannot be had from MLflow at {without_password(uri)}: {reason}") from None


def _place_of(client: MlflowClient, artifact_uri: str) -> str:
    """Where the artifacts of a model's version lie: left to MLflow, the process's own registry would be asked."""
    if not artifact_uri.startswith("models:/"):
        return artifact_uri
    name, _, alias = artifact_uri.removeprefix("models:/").partition("@")
    if alias:
        version = str(client.get_model_version_by_alias(name, alias).version)
    else:
        name, _, version = name.rpartition("/")
    place: str = client.get_model_version_download_uri(name, version)
    if place.startswith("models:/"):  # a logged model, known by its id
        place = client.get_logged_model(place.removeprefix("models:/")).artifact_location
    return place
