"""Real servers on loopback, for the tests and for a show of the whole system on one machine.

PostgreSQL from the distribution's package, Ceph's S3 gateway through the scripts beside the project
(../shared/s3), MLflow from this environment. Each is a context manager that stops what it started by its
process id; passwords are drawn at the first start and kept in a file that only the owner reads.

`python tests/services.py DIR` starts all three, writes DIR/env and waits for Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import sqlalchemy
import sqlalchemy.exc

S3_SCRIPTS = Path(__file__).resolve().parents[2] / "shared" / "s3"
DATABASES = ("mlflow", "optuna")


class S3Server(NamedTuple):
    """A running S3 server: its address, one empty bucket, and the AWS_* settings that clients need."""

    endpoint: str
    bucket: str
    env: dict[str, str]


def postgres_unavailable() -> str | None:
    """Say why PostgreSQL cannot run here, or None."""
    if _postgres_programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and _unprivileged_user() is None:
        return "PostgreSQL refuses to run as root, and neither a user 'postgres' nor 'nobody' exists"
    return None


def s3_unavailable() -> str | None:
    """Say why the S3 server cannot run here, or None."""
    if not (S3_SCRIPTS / "s3-up.sh").is_file():
        return "the scripts of the S3 server are not beside the project: ../shared/s3/s3-up.sh"
    missing = [program for program in ("radosgw", "ceph-mon", "ceph-osd", "ceph", "curl") if not _has(program)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install radosgw ceph-mon ceph-osd ceph-common curl"
    return None


def mlflow_unavailable() -> str | None:
    """Say why the MLflow server cannot run here, or None."""
    missing = [name for name in ("mlflow", "boto3", "psycopg2") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: .ci/setup cluster" if missing else None


@contextlib.contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """Run PostgreSQL with the empty databases `mlflow` and `optuna`.

    Yields `postgresql+psycopg2://user:password@127.0.0.1:port` without a database: append `/mlflow` or
    `/optuna`. The data live in `directory` and survive a restart, except as root under a folder that the
    unprivileged user cannot enter (pytest's tmp_path): then they live in a temporary folder and go with it.
    Raises RuntimeError with the end of the server's log when it does not come up.
    """
    programs = _postgres_programs()
    if programs is None:
        raise RuntimeError(postgres_unavailable())
    user = _unprivileged_user() if os.geteuid() == 0 else None
    directory.mkdir(parents=True, exist_ok=True)
    password = _remembered(directory / "postgres.json", lambda: {"password": secrets.token_hex(16)})["password"]
    with contextlib.ExitStack() as stack:
        home = directory
        if user is not None and not _can_enter(user, directory):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dskd-postgres-")))
            home.chmod(0o755)
        data = home / "postgres"
        if not (data / "PG_VERSION").exists():
            data.mkdir(mode=0o700, exist_ok=True)
            _initialise(programs, data, password, user)
        port = free_port()
        log = stack.enter_context((directory / "postgres.log").open("ab"))
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        # fsync off: a test's database need not survive the machine, only the process
        for setting in ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"):
            command += ["-c", setting]
        server = subprocess.Popen(
            command,
            cwd="/",
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=user,
            group=_group(user),
            extra_groups=None if user is None else [],
        )
        # SIGINT is PostgreSQL's fast shutdown: it ends open connections instead of waiting for them
        stack.callback(_stop, server, signal.SIGINT)
        url = f"postgresql+psycopg2://dskd:{password}@127.0.0.1:{port}"
        _wait(lambda: _make_databases(url), server, Path(log.name), seconds=60)
        yield url


@contextlib.contextmanager
def s3(directory: Path, *, bucket: str = "dskd", size: str = "8G") -> Iterator[S3Server]:
    """Run a real S3 server (Ceph's RADOS gateway) with one bucket.

    `size` is that of the sparse file which holds the objects, fixed at the first start; the data survive a
    restart. Raises ValueError for a folder whose path is too long for a UNIX socket, RuntimeError with the
    end of the log when the server does not come up.
    """
    reason = s3_unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    directory = directory.resolve()
    if len(str(directory)) > 80:
        raise ValueError(
            f"The S3 server needs a folder path of at most 80 characters (its sockets live there), "
            f"got {len(str(directory))}: choose a shorter one than {directory}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    fixed = _remembered(
        directory / "s3.json",
        lambda: {
            "S3_KEY": secrets.token_hex(8),
            "S3_SECRET": secrets.token_hex(16),
            "S3_MON_PORT": str(free_port()),
        },
    )
    state = directory / "s3"
    settings = {
        **os.environ,
        **fixed,
        "S3_DIR": str(state),
        "S3_PORT": str(free_port()),
        "S3_BUCKET": bucket,
        "S3_SIZE": size,
        "S3_INSTALL": "0",  # a test installs nothing
    }
    with (directory / "s3.log").open("ab") as log:

        def call(script: str) -> int:
            # a session of its own: Ctrl-C must reach us, who then stop the server in order
            return subprocess.call(
                ["bash", S3_SCRIPTS / script], env=settings, stdout=log, stderr=log, start_new_session=True
            )

        try:
            if call("s3-up.sh") != 0:
                raise RuntimeError(f"The S3 server did not start: {_tail(Path(log.name))}")
            env = _exports(state / "env")
            yield S3Server(endpoint=env["AWS_ENDPOINT_URL"], bucket=bucket, env=env)
        finally:
            call("s3-down.sh")


@contextlib.contextmanager
def mlflow_server(
    directory: Path,
    *,
    backend_uri: str,
    artifact_root: str,
    env: Mapping[str, str] | None = None,
    admin_password: str | None = None,
) -> Iterator[str]:
    """Run an MLflow tracking server that passes artifacts on to `artifact_root`; yields its URL.

    With `admin_password` it asks who one is (MLflow's basic-auth app), and knows the user `admin`.

    `backend_uri` is an SQLAlchemy URL with its database, `artifact_root` a folder or `s3://bucket/path`,
    `env` what the server needs to reach it (`S3Server.env`). Raises RuntimeError with the end of the server's
    log when it does not come up.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {
        **os.environ,
        **(env or {}),
        # not on the command line, where every user of the machine would read the password
        "MLFLOW_BACKEND_STORE_URI": backend_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": artifact_root,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # LLM evaluation jobs: four more processes, unused
    }
    settings.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    if admin_password is not None:
        command += ["--app-name", "basic-auth"]
        settings |= {
            "MLFLOW_AUTH_ADMIN_PASSWORD": admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
        }
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "mlflow.log").open("ab"))
        server = subprocess.Popen(command, cwd=directory, env=settings, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_stop, server, signal.SIGTERM)
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: _answers(f"{url}/health"), server, Path(log.name), seconds=180)
        yield url


@contextlib.contextmanager
def all_services(directory: Path) -> Iterator[dict[str, str]]:
    """Run all three; yields the environment in which `tune/search.py` uses them.

    Beside the AWS_* settings: MLFLOW_TRACKING_URI, DSKD_STORAGE (`s3://…`) and DSKD_STUDY_STORAGE
    (`postgresql+psycopg2://…/optuna`).
    """
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres(directory))
        store = stack.enter_context(s3(directory))
        tracking = stack.enter_context(
            mlflow_server(
                directory,
                backend_uri=f"{database}/mlflow",
                artifact_root=f"s3://{store.bucket}/mlflow",
                env=store.env,
            )
        )
        yield {
            **store.env,
            "MLFLOW_TRACKING_URI": tracking,
            "DSKD_STORAGE": f"s3://{store.bucket}/searches",
            "DSKD_STUDY_STORAGE": f"{database}/optuna",
        }


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Start all three servers, write DIR/env, wait for Ctrl-C or SIGTERM, stop them."""
    parser = argparse.ArgumentParser(
        description="Start PostgreSQL, an S3 server and an MLflow server on free ports of 127.0.0.1, "
        "write the settings that reach them to DIR/env, and stop all three on Ctrl-C or SIGTERM."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder for data, logs and DIR/env")
    directory: Path = parser.parse_args().directory.resolve()
    reasons = filter(None, (postgres_unavailable(), s3_unavailable(), mlflow_unavailable()))
    if problems := "\n".join(reasons):
        sys.exit(problems)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), all_services(directory) as env:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
        lines += [f'export {name}="127.0.0.1,localhost${{{name}:+,${name}}}"' for name in ("NO_PROXY", "no_proxy")]
        _write_private(directory / "env", "\n".join(lines) + "\n")
        sys.stdout.write(
            f"MLflow UI: {env['MLFLOW_TRACKING_URI']}\n"
            f"In another shell: . {directory / 'env'}\nCtrl-C stops the servers.\n"
        )
        sys.stdout.flush()
        try:
            signal.pause()
        finally:
            (directory / "env").unlink(missing_ok=True)


def _has(program: str) -> bool:
    return shutil.which(program) is not None


def _postgres_programs() -> Path | None:
    """The folder of the newest installed server: Debian keeps it off PATH."""
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    found = sorted((f for f in folders if (f / "initdb").exists()), key=lambda f: float(f.parent.name))
    return found[-1] if found else None


def _unprivileged_user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


def _group(user: str | None) -> int | None:
    return None if user is None else pwd.getpwnam(user).pw_gid


def _can_enter(user: str, directory: Path) -> bool:
    return (
        subprocess.call(
            ["test", "-x", directory],
            cwd="/",
            user=user,
            group=_group(user),
            extra_groups=[],
            stderr=subprocess.DEVNULL,
        )
        == 0
    )


def _initialise(programs: Path, data: Path, password: str, user: str | None) -> None:
    with tempfile.NamedTemporaryFile("w") as password_file:
        password_file.write(password)
        password_file.flush()
        if user is not None:
            for path in (data, password_file.name):
                shutil.chown(path, user, _group(user))
        command = [str(programs / "initdb"), "-D", str(data), "-U", "dskd", f"--pwfile={password_file.name}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(
            command,
            cwd="/",
            user=user,
            group=_group(user),
            extra_groups=None if user is None else [],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        shutil.rmtree(data)
        raise RuntimeError(f"initdb failed: {done.stderr.strip()}")


def _make_databases(url: str) -> bool:
    """Make what is missing of the databases; False as long as the server does not answer."""
    engine = sqlalchemy.create_engine(f"{url}/postgres", isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            there = set(connection.scalars(sqlalchemy.text("SELECT datname FROM pg_database")))
            for name in DATABASES:
                if name not in there:
                    connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        return True
    except sqlalchemy.exc.OperationalError:
        return False
    finally:
        engine.dispose()


def _answers(url: str) -> bool:
    # no proxy: a proxy of the environment knows nothing of this machine's loopback
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait(ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if server.poll() is not None:
            raise RuntimeError(f"{log.stem} ended with exit code {server.returncode}: {_tail(log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{log.stem} did not answer within {seconds:.0f} s: {_tail(log)}")
        time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes], gently: signal.Signals) -> None:
    if server.poll() is None:
        server.send_signal(gently)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    # what a killed server leaves behind is in its session, which is ours alone
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _exports(path: Path) -> dict[str, str]:
    """The variables that a shell file of `export A=1 B='2'` lines sets."""
    words = shlex.split(path.read_text(), comments=True)
    return dict(word.split("=", 1) for word in words if word != "export")


def _remembered(path: Path, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    if not path.exists():
        _write_private(path, json.dumps(make()))
    stored: dict[str, str] = json.loads(path.read_text())
    return stored


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
