"""Files below a folder or an s3:// address, read and written with pyarrow as Ray does."""

import copy
import errno
import fcntl
import functools
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import pyarrow.fs
import tenacity

from tune.storage.shown import shown, shown_url
from tune.storage.temporary import temporary_folder
from tune.storage.uris import absolute, is_address

_T = TypeVar("_T")
RETRY_PAUSE = 0.5
"""Seconds between the first attempt and the second; each pause is twice the one before, up to 30 s."""
RETRY_ATTEMPTS = 8
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 10.0
"""Seconds that boto3 waits for a server: what it reads and writes at once is small."""
_SQLITE_SECONDS = 5.0
"""Seconds to wait for another process's transaction."""


class StorageError(OSError):
    """The storage refused or did not answer; the message gives the address and the reason."""


class StoredFile(NamedTuple):
    """A file as listed by its storage."""

    name: str
    """Path below the listed folder, separated by slashes."""
    num_bytes: int
    modified_ns: int


class Storage:
    """Files below one root address; every method takes names below it.

    A failed operation is retried with growing pauses for about a minute. Error messages name the flag by which
    the address was given.
    """

    def __init__(self, uri: str, flag: str = "--storage") -> None:
        self.uri = uri.rstrip("/")
        self._attempts = 0
        """How often an operation is tried; 0: `RETRY_ATTEMPTS`."""
        self._client: Any = None
        """boto3's, for what pyarrow cannot do; made when it is first needed."""
        trust_one_authority()
        # pyarrow adds checksums in trailers that many S3-compatible servers refuse with HTTP 411.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        try:
            if "://" not in uri:
                Path(uri).mkdir(parents=True, exist_ok=True)
            self._files, self._root = pyarrow.fs.FileSystem.from_uri(self.uri)
            if isinstance(self._files, pyarrow.fs.S3FileSystem) and os.environ.get("SSL_CERT_FILE"):
                # pyarrow reads the variable when it is imported, which is before `trust_one_authority` has set it.
                _, (options,) = self._files.__reduce__()
                self._files = pyarrow.fs.S3FileSystem(**options | {"tls_ca_file_path": os.environ["SSL_CERT_FILE"]})
        except (OSError, pyarrow.ArrowException) as error:
            raise StorageError(f"{flag} {shown_url(uri)} cannot be opened: {_first_line(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        """Without boto3's client, which every process makes for itself."""
        return self.__dict__ | {"_client": None}

    def tried_once(self) -> "Storage":
        """The same files, with no second attempt at a failed operation."""
        once = copy.copy(self)
        once._attempts = 1
        return once

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON document `name`; None if it does not exist. Raises StorageError if it is none."""

        def read() -> dict[str, Any] | None:
            kind = self._kind(name)
            if kind == pyarrow.fs.FileType.NotFound:
                return None
            if kind == pyarrow.fs.FileType.Directory:
                raise StorageError(f"{self.uri}/{name} is a folder, expected a JSON document.")
            with self._files.open_input_stream(self._path(name)) as file:
                text = file.read()
            try:
                return json.loads(text)  # type: ignore[no-any-return]
            except ValueError as error:  # bytes that are no UTF-8, too
                raise StorageError(f"{self.uri}/{name} is no JSON document: {_first_line(error)}") from None
            except RecursionError:
                raise StorageError(f"{self.uri}/{name} is no JSON document: nested too deep") from None

        return self._with_retries(read, f"reading {name}")

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write a JSON document atomically: a reader sees the old one or the new one."""
        self._with_retries(lambda: self._put(name, _text(document)), f"writing {name}")

    def replace_json(self, name: str, change: Callable[[dict[str, Any] | None], dict[str, Any] | None]) -> None:
        """Write what `change` makes of the JSON document `name`, unless another process has written it meanwhile.

        Then `change` is called once more, with what is there now. It gets None where there is no document or none that
        can be read, and returns None to leave things as they are; what it raises is raised here. In a folder writers
        wait for each other, in S3 the write is conditional (If-Match). Where a server or a file system has neither, the
        document may change between the call and the write.
        """

        def replace() -> None:
            if isinstance(self._files, pyarrow.fs.LocalFileSystem):
                path = Path(self._path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                with _one_writer(path.parent):
                    known = path.read_bytes() if path.is_file() else None
                    if (document := change(_document(known))) is not None:
                        self._put(name, _text(document))
            elif isinstance(self._files, pyarrow.fs.S3FileSystem):
                self._replace_object(name, change)
            else:
                there = self._kind(name) == pyarrow.fs.FileType.File
                content = self._files.open_input_stream(self._path(name)).readall() if there else None
                if (document := change(_document(content))) is not None:
                    self._put(name, _text(document))

        self._with_retries(replace, f"writing {name}")

    def _put(self, name: str, data: bytes) -> None:
        """Write one file, once; a reader sees the old one or the new one."""
        path = self._path(name)
        if isinstance(self._files, pyarrow.fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            partial = Path(f"{path}.partial")
            partial.write_bytes(data)
            os.replace(partial, path)
        elif isinstance(self._files, pyarrow.fs.S3FileSystem):
            self._put_object(path, data)
        else:
            with self._files.open_output_stream(path) as file:
                file.write(data)

    def _put_object(self, path: str, data: bytes) -> None:
        """Write an object in S3 in one request; pyarrow takes three, and waits for a server that never answers."""
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = path.partition("/")
        try:
            self._s3().put_object(Bucket=bucket, Key=key, Body=data)
        except (BotoCoreError, ClientError) as error:
            raise OSError(_first_line(error)) from None

    def _replace_object(self, name: str, change: Callable[[dict[str, Any] | None], dict[str, Any] | None]) -> None:
        """One attempt of `replace_json` at an object in S3; raises OSError if it was changed meanwhile."""
        from botocore.exceptions import BotoCoreError, ClientError  # slow imports that few processes need

        bucket, _, key = self._path(name).partition("/")
        try:
            known, tag = self._object(bucket, key)
            if (document := change(_document(known))) is None:
                return
            # With quotes as in HTTP, and first of all without: Ceph 16 compares them too.
            conditions = [{"IfMatch": tag.strip('"')}, {"IfMatch": tag}] if tag else [{"IfNoneMatch": "*"}]
            write = functools.partial(self._s3().put_object, Bucket=bucket, Key=key, Body=_text(document))
            for condition in conditions:
                try:
                    write(**condition)
                    return
                except ClientError as error:
                    if _status(error) == 501:  # a server without conditions
                        write()
                        return
                    if _status(error) not in (404, 409, 412):
                        raise
            raise OSError("another process has written it meanwhile")
        except (BotoCoreError, ClientError) as error:
            raise OSError(_first_line(error)) from None

    def _object(self, bucket: str, key: str) -> tuple[bytes | None, str]:
        """An object's content and ETag; None and an empty one if it is missing."""
        from botocore.exceptions import ClientError

        try:
            found = self._s3().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied"):  # as in `_kind`
                raise
            return None, ""
        return found["Body"].read(), found["ETag"]

    def _s3(self) -> Any:
        """boto3's client of the server that pyarrow uses."""
        if self._client is None:
            import boto3
            from botocore.config import Config

            has_own_endpoint = any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
            style = "path" if has_own_endpoint else "auto"
            # As pyarrow: no proxy of the environment; tried once, as `_with_retries` tries again.
            config = Config(
                s3={"addressing_style": style},
                proxies={},
                retries={"total_max_attempts": 1},
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_ANSWER_SECONDS,
            )
            session = boto3.session.Session(region_name=self._files.region)
            self._client = session.client("s3", config=config)
        return self._client

    def upload(self, folder: Path, name: str) -> None:
        """Copy the files of a local folder to `name`."""

        def copy() -> None:
            if isinstance(self._files, pyarrow.fs.S3FileSystem):
                for path in sorted(each for each in folder.rglob("*") if each.is_file()):
                    self._upload_object(path, self._path(f"{name}/{path.relative_to(folder).as_posix()}"))
            else:
                pyarrow.fs.copy_files(
                    str(folder),
                    self._path(name),
                    source_filesystem=pyarrow.fs.LocalFileSystem(),
                    destination_filesystem=self._prepared(name),
                )

        self._with_retries(copy, f"uploading {name}")

    def _upload_object(self, local: Path, path: str) -> None:
        """Write a file of any size as an object in S3, in parts of 8 MiB; pyarrow may wait for a server for ever."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = path.partition("/")
        try:
            self._s3().upload_file(str(local), bucket, key)
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            raise OSError(_first_line(error)) from None

    def download(self, name: str, folder: Path) -> None:
        """Copy the files below `name` into a local folder, which is created.

        Raises StorageError if there are none, or if a name points outside the folder.
        """

        def copy() -> None:
            found = self._files.get_file_info(pyarrow.fs.FileSelector(self._path(name), recursive=True))
            for info in found:
                relative = self._relative(info.path, name)
                if info.is_file:
                    target = folder / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with self._files.open_input_stream(info.path) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 22)
            if not found:
                raise StorageError(f"{self.uri}/{name} is empty.")

        self._with_retries(copy, f"downloading {name}")

    def resume(self, name: str, path: Path, limit: int | None = None) -> None:
        """Copy one file to `path`; resumes a partial copy.

        Raises StorageError if there is no such file or if it has more than `limit` bytes.
        """

        def copy() -> None:
            info = self._files.get_file_info(self._path(name))
            if not info.is_file:
                raise StorageError(f"{self.uri} holds no file {name}.")
            if limit is not None and info.size > limit:
                raise StorageError(f"{self.uri}/{name} has {info.size} bytes, more than the {limit} it may have.")
            have = path.stat().st_size if path.exists() else 0
            if have > info.size:
                path.unlink()
                have = 0
            with self._files.open_input_file(self._path(name)) as source, path.open("ab") as sink:
                source.seek(have)
                shutil.copyfileobj(source, sink, 1 << 22)

        self._with_retries(copy, f"fetching {name}")

    def names(self, folder: str) -> list[str]:
        """Names directly below a folder; empty if it does not exist."""
        selector = pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self._with_retries(lambda: self._files.get_file_info(selector), f"listing {folder}")
        return [info.base_name for info in found]

    def files(self, folder: str) -> list[StoredFile]:
        """Every file below a folder ("": the root), sorted by name; empty if it does not exist.

        Raises StorageError if a name points outside the folder.
        """
        selector = pyarrow.fs.FileSelector(self._path(folder), allow_not_found=True, recursive=True)
        found = self._with_retries(lambda: self._files.get_file_info(selector), f"listing {folder}")
        files = [
            StoredFile(self._relative(info.path, folder).as_posix(), info.size, info.mtime_ns)
            for info in found
            if info.is_file
        ]
        return sorted(files)

    def fetch(self, name: str, path: Path) -> None:
        """Copy one file to a local path, whose folder must exist."""

        def copy() -> None:
            with self._files.open_input_stream(self._path(name)) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)

        self._with_retries(copy, f"downloading {name}")

    def write(self, name: str, data: bytes) -> None:
        """Write one file atomically."""
        self._with_retries(lambda: self._put(name, data), f"writing {name}")

    def remove(self, folder: str) -> None:
        """Remove a folder and all files below it; nothing happens if there is none."""

        def remove() -> None:
            if self._kind(folder) == pyarrow.fs.FileType.NotFound:
                return
            try:
                self._files.delete_dir(self._path(folder))
            except OSError as error:
                if not _is_denied(error):
                    raise
                # Some servers ask for a right on the bucket to delete several objects in one request.
                for info in self._files.get_file_info(pyarrow.fs.FileSelector(self._path(folder), recursive=True)):
                    if info.is_file:
                        self._files.delete_file(info.path)

        self._with_retries(remove, f"removing {folder}")

    def remove_file(self, name: str) -> None:
        """Remove one file; nothing happens if there is none."""

        def remove() -> None:
            if self._kind(name) == pyarrow.fs.FileType.File:
                self._files.delete_file(self._path(name))

        self._with_retries(remove, f"removing {name}")

    def location(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """pyarrow file system and path of the root, for libraries that need them."""
        return self._files, self._root

    def probe(self) -> None:
        """Make, read, list and remove a small folder by the same requests as a search, each tried once.

        Ray makes a folder by asking for its bucket, and reads what is missing. Nothing is made but objects. Raises
        StorageError if a request fails.
        """
        name = f".probe-{os.getpid()}-{time.time_ns()}"
        if isinstance(self._files, pyarrow.fs.LocalFileSystem) and not Path(self._root).is_dir():
            raise StorageError(f"--storage {self.uri} is not usable: it is no folder any more.")
        once = self.tried_once()
        with temporary_folder() as temporary:
            (temporary / "probe.json").write_text('{"probe": true}')
            try:
                missing = once.read_json(f"{name}/missing.json")
                self._files.create_dir(self._path(f"{name}/folder"))
                once.upload(temporary, f"{name}/folder")
                once.replace_json(f"{name}/probe.json", lambda known: {"probe": known})
                once.replace_json(f"{name}/probe.json", lambda known: {"probe": known == {"probe": None}})
                found = (once.read_json(f"{name}/probe.json"), once.read_json(f"{name}/folder/probe.json"))
                listed = once.names(f"{name}/folder")
                once.remove(name)
                left = once.files(name)
            except (OSError, pyarrow.ArrowException) as error:
                rights = "; cluster/s3-policy.json has the rights that a search needs" if _is_denied(error) else ""
                raise StorageError(f"--storage {self.uri} is not usable: {_first_line(error)}{rights}") from None
        if (missing, found, listed, left) != (None, ({"probe": True},) * 2, ["probe.json"], []):
            raise StorageError(f"--storage {self.uri} gave back something else than was written.")

    def _kind(self, name: str) -> pyarrow.fs.FileType:
        """What is called `name`; a server that may not say that it is missing says that it is forbidden."""
        path = self._path(name)
        try:
            return self._files.get_file_info(path).type
        except OSError as error:
            if not _is_denied(error):
                raise
            beside = pyarrow.fs.FileSelector(str(PurePosixPath(path).parent), allow_not_found=True)
            found = [info.type for info in self._files.get_file_info(beside) if info.path == path]
            return found[0] if found else pyarrow.fs.FileType.NotFound

    def _relative(self, path: str, folder: str) -> PurePosixPath:
        """A listed path relative to the folder; raises StorageError if it points outside."""
        relative = PurePosixPath(path).relative_to(self._path(folder))
        if ".." in relative.parts or relative.is_absolute():
            raise StorageError(f"{self.uri}/{folder} holds the unsafe name {relative}; refused.")
        return relative

    def _prepared(self, name: str) -> pyarrow.fs.FileSystem:
        if isinstance(self._files, pyarrow.fs.LocalFileSystem):
            Path(self._path(name)).mkdir(parents=True, exist_ok=True)
        return self._files

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _with_retries(self, act: Callable[[], _T], what: str) -> _T:
        return with_retries(act, f"{what} at {self.uri}", self._attempts)


def trust_one_authority() -> None:
    """Let pyarrow and boto3 trust the same certificates: each reads a variable of its own, and one is enough."""
    own, everywhere = os.environ.get("AWS_CA_BUNDLE"), os.environ.get("SSL_CERT_FILE")
    if own and not everywhere:
        os.environ["SSL_CERT_FILE"] = own
    elif everywhere and not own:
        os.environ["AWS_CA_BUNDLE"] = everywhere


def _is_denied(error: Exception) -> bool:
    return "ACCESS_DENIED" in str(error) or "AccessDenied" in str(error)


def _status(error: Any) -> int:
    """HTTP status of a refusal that boto3 raised."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _document(content: bytes | None) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    try:
        found = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """While the block runs, no other process is in such a block for the same folder; raises BlockingIOError if one is.

    A file system that has no locks has none here either.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            unlocked: AbstractContextManager[None] = nullcontext()
        else:
            unlocked = unlocking(lock.fileno())
        with unlocked:
            yield


@contextmanager
def unlocking(lock: int) -> Iterator[None]:
    """Give a file's lock back after the block, by saying so.

    Closing the file is not enough: a program that another thread is just starting holds a copy of it for a moment.
    """
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def with_retries(act: Callable[[], _T], what: str, attempts: int = 0) -> _T:
    """Call `act` and return its result; storage errors are retried with growing pauses for about a minute.

    `attempts`: at most so many; 0: `RETRY_ATTEMPTS`.

    Raises StorageError, naming `what`, if every attempt failed.
    """
    attempts = attempts or RETRY_ATTEMPTS
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_retryable),
        wait=tenacity.wait_exponential(multiplier=RETRY_PAUSE, max=30.0),
        stop=tenacity.stop_after_attempt(attempts),
    )
    try:
        return retrying(act)
    except tenacity.RetryError as error:
        last = error.last_attempt.exception()
        assert isinstance(last, Exception)
        raise StorageError(f"{what} failed {attempts} times: {_first_line(last)}") from None


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, OSError | pyarrow.ArrowException) and not isinstance(error, StorageError)


@contextmanager
def created_by_one(url: str) -> Iterator[str]:
    """While the block runs, no other process of this machine is in such a block for the same SQLite file.

    For the first opening of a database, which makes its tables: two processes that do so at once would collide. Yields
    the URL to open: that of another file if there is none yet, which takes its name only when the block has succeeded,
    as a process that ends between two tables would leave a file that nobody can use. Other URLs need no lock.
    """
    scheme, _, path = url.partition(":///")
    folder = Path(path).parent
    if not scheme.startswith("sqlite") or not path or not folder.is_dir():
        yield url
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if Path(path).exists():
            yield url
            return
        making = folder / f".making-{Path(path).name}"
        making.unlink(missing_ok=True)  # of a process that was killed
        yield f"{scheme}:///{making}"
        if making.exists():
            with closing(sqlite3.connect(making)) as file:
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            making.rename(path)
    finally:
        os.close(handle)


def check_unlocked(url: str, flag: str) -> None:
    """Raise ConnectionError, in one line, if an existing SQLite file cannot be written to; other URLs pass."""
    scheme, _, path = url.partition(":///")
    if not scheme.startswith("sqlite") or not Path(path).is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_SQLITE_SECONDS, isolation_level=None)) as file:
            file.execute("BEGIN IMMEDIATE")
            file.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise ConnectionError(
            f"{flag} {shown_url(url)} cannot be written to: {error}; end what holds it, or name another file."
        ) from None


def open_search(storage: str, name: str) -> Storage:
    """The storage of an existing search: `name` below the folder or s3:// address `storage`.

    Raises StorageError if a local one does not exist."""
    root = absolute(storage)
    if not is_address(storage) and not Path(root, name).is_dir():
        raise StorageError(f"no search {name!r} in {root}; check --name and --storage.")
    return Storage(f"{root}/{name}")


def _first_line(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
