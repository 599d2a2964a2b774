"""Serves all champions with Ray Serve, and replaces one by the next while requests go on."""

import asyncio
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.util.metrics
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dskd.data.images import MAX_MEGAPIXELS
from dskd.detector import Detector
from dskd.jobs.feedback import MAX_ENTRIES, judged_note
from dskd.page.app import make_app
from dskd.page.bench import answer_each
from dskd.page.guard import Limits
from dskd.page.inspector import Category, Judged, Photo, Question, Refusal, unknown_category
from dskd.page.judging import check_photo, describe_category
from dskd.page.server import LOOPBACK, TOKEN, page_token
from tune.runtime.cluster import connect
from tune.settings.entry import say
from tune.settings.serve import ServeSettings
from tune.storage.champions import champion_categories, download_detector, download_detector_files, find_champion
from tune.storage.files import Storage, open_search
from tune.storage.shown import shown
from tune.storage.temporary import temporary_folder
from tune.storage.uris import absolute
from tune.tracking.client import check_server, embedded_tracking, registry_client
from tune.tracking.registry import fetch, find_registered, registered_categories

APPLICATION = "dskd"
MAX_BATCH = 32
"""Images that a replica judges at once."""
_BATCH_SECONDS = 0.005
"""How long a batch waits for more images: requests that come together are seen together."""
_MAX_ONGOING = 512
_log = logging.getLogger("ray.serve")

Fetch = Callable[[Path], object]
"""Downloads a champion as a detector folder."""


def champions_of(settings: ServeSettings) -> dict[str, tuple[str, Fetch]]:
    """What is champion now: for each category a text that changes with the champion, and how it is downloaded.

    Raises OSError or ValueError, in one line, if the storage or the registry does not answer, or a category that is
    wanted has no champion.
    """
    found = _registered(settings) if settings.alias else _stored(settings)
    if missing := [name for name in settings.wanted if name not in found]:
        raise ValueError(f"there is no champion of {missing[0]!r}; there are: {', '.join(sorted(found)) or 'none'}.")
    return {name: each for name, each in found.items() if not settings.wanted or name in settings.wanted}


def _stored(settings: ServeSettings) -> dict[str, tuple[str, Fetch]]:
    search = open_search(settings.storage, settings.name)
    champions = {name: find_champion(search, name) for name in champion_categories(search)}
    return {
        name: (repr(champion), partial(download_detector, search, champion))
        for name, champion in champions.items()
        if champion is not None
    }


def _registered(settings: ServeSettings) -> dict[str, tuple[str, Fetch]]:
    tracking = settings.tracking_uri or embedded_tracking(settings.storage, "--alias")
    check_server(tracking)
    client, alias = registry_client(tracking), settings.alias or ""
    found: dict[str, tuple[str, Fetch]] = {}
    for name in settings.wanted or registered_categories(client, alias):
        detector = find_registered(client, name, alias)
        found[name] = (
            detector.version,
            partial(download_detector_files, partial(fetch, client, detector), detector.files),
        )
    return found


class Champions:
    """Holds the champions of all categories, judges images in batches, and looks for new champions."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Load every champion; raises as `champions_of`, so that a replica without them never gets ready."""
        self._settings = ServeSettings(**settings)
        os.environ.setdefault(MAX_MEGAPIXELS, str(self._settings.max_megapixels))
        self._device = "cuda" if self._settings.gpus_per_replica else "cpu"
        self._detectors: dict[str, tuple[str, Detector]] = {}
        self._images = ray.util.metrics.Counter("dskd_images", "Images by verdict.", ("category", "verdict"))
        self._seconds = ray.util.metrics.Histogram(
            "dskd_batch_seconds", "Time of a batch.", boundaries=[0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
        )
        self.refresh()
        threading.Thread(target=self._watch, daemon=True).start()

    def refresh(self) -> None:
        """Take over new champions. One is loaded beside the one in use, which answers until then."""
        current = champions_of(self._settings)
        for name, (stamp, download) in current.items():
            if name in self._detectors and self._detectors[name][0] == stamp:
                continue
            with temporary_folder() as temporary:
                folder = temporary / "detector"
                download(folder)
                detector = Detector.load(folder, self._device, self._settings.precision)
            self._detectors = {**self._detectors, name: (stamp, detector)}  # one step: who reads sees old or new
            _log.info("serves version %s of %s", detector.record.detector_version, name)
        self._detectors = {name: each for name, each in self._detectors.items() if name in current}

    def _watch(self) -> None:
        while True:
            time.sleep(self._settings.poll_seconds)
            try:
                self.refresh()
            except Exception as error:  # storage or registry away, a champion not whole: what is loaded goes on
                _log.warning("new champions could not be taken over: %s", shown(str(error)))

    async def categories(self) -> list[Category]:
        return [describe_category(detector.record)._replace(name=name) for name, (_, detector) in self._held()]

    def _held(self) -> list[tuple[str, tuple[str, Detector]]]:
        return sorted(self._detectors.items())

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=_BATCH_SECONDS)
    async def inspect(self, questions: list[Question]) -> list[dict[str, Any] | tuple[int, str]]:
        """For each image its row, or status and sentence of the refusal."""
        return await asyncio.to_thread(self._judge, questions)

    def _judge(self, questions: Sequence[Question]) -> list[dict[str, Any] | tuple[int, str]]:
        started = time.perf_counter()
        detectors = self._detectors
        items = [(question, Future[dict[str, Any]]()) for question in questions]
        for name in {question.category for question in questions} & set(detectors):
            answer_each(detectors[name][1], [item for item in items if item[0].category == name])
        rows = [_row_of(question, answer, tuple(detectors)) for question, answer in items]
        self._seconds.observe(time.perf_counter() - started)
        for row in rows:
            if isinstance(row, dict):
                self._images.inc(1, {"category": row["category"], "verdict": row["verdict"]})
        return rows

    async def keep_feedback(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any] | tuple[int, str]:
        """The note of an image that was kept, or status and sentence of the refusal."""
        try:
            return await asyncio.to_thread(self._keep, category, photo, judged)
        except Refusal as refusal:
            return refusal.status, refusal.sentence

    def _keep(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any]:
        if category not in self._detectors:
            raise unknown_category(category, tuple(self._detectors))
        place = self._settings.feedback
        if place is None and not self._settings.alias:
            place = f"{absolute(self._settings.storage)}/{self._settings.name}/feedback"
        if place is None:
            raise Refusal(403, "This server keeps no judgements; it was started without --feedback.")
        check_photo(photo)
        version = self._detectors[category][1].record.detector_version
        note = judged_note(photo.content, judged, photo.name, version)
        storage = Storage(absolute(place), "--feedback")
        there = storage.names(category)
        if note["file"] not in there:
            if len(there) >= 2 * MAX_ENTRIES:
                raise Refusal(503, "The quarantine of judged images is full; someone has to look at it.")
            storage.write(f"{category}/{note['file']}", photo.content)
        storage.write(f"{category}/{Path(note['file']).stem}.json", json.dumps(note, indent=2).encode())
        return note

    def check_health(self) -> None:
        """Asked by Ray Serve; a replica that cannot say what it holds is replaced."""
        if not self._detectors:
            raise RuntimeError("no champion is loaded")


def _row_of(
    question: Question, answer: "Future[dict[str, Any]]", known: Sequence[str]
) -> dict[str, Any] | tuple[int, str]:
    if not answer.done():
        return 404, unknown_category(question.category, known).sentence
    if (error := answer.exception()) is not None:
        _log.error("an image could not be judged: %r", error)
        return 503, "This image could not be judged; the server's log says why."
    return answer.result()


class _Replicas:
    """The `Inspector` that asks the replicas of `Champions`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def categories(self) -> Sequence[Category]:
        known: list[Category] = await _asked(self._handle.categories.remote())
        return known

    async def inspect(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        answers = await asyncio.gather(*(_asked(self._handle.inspect.remote(question)) for question in questions))
        return [_checked(answer) for answer in answers]

    async def keep_feedback(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any]:
        return _checked(await _asked(self._handle.keep_feedback.remote(category, photo, judged)))


async def _asked(answer: Any) -> Any:
    try:
        return await answer
    except (RayError, RayServeException) as error:  # a replica that died, or more requests than all can hold
        _log.warning("a replica did not answer: %s", type(error).__name__)
        raise Refusal(503, "No replica can answer this now; send it again in a few seconds.") from None


def _checked(answer: dict[str, Any] | tuple[int, str]) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    raise Refusal(*answer)


class Page:
    """The guarded application in front of the champions."""

    def __init__(self, champions: DeploymentHandle[Any], token: str, hosts: tuple[str, ...], limits: Limits) -> None:
        self._app = make_app(_Replicas(champions), token=token or page_token_of_node(), hosts=hosts, limits=limits)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def page_token_of_node() -> str:
    """The token of this node's environment; raises ValueError without one: where nobody reads it none is drawn."""
    token, is_own = page_token()
    if not is_own:
        raise ValueError(f"${TOKEN} is not set on this node; the page is served to nobody without a token.")
    return token


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve configuration: `import_path: tune.jobs.serve:build`.

    `arguments` are flags of `tune/serve.py` without their dashes; the token comes from the nodes' environment.
    """
    return application(ServeSettings(**arguments), "")


def application(settings: ServeSettings, token: str) -> serve.Application:
    """`token` empty: of the nodes' environment."""
    champions = serve.deployment(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=_MAX_ONGOING,
        health_check_period_s=10,
    )(Champions).bind(asdict(settings))
    page = serve.deployment(max_ongoing_requests=_MAX_ONGOING, ray_actor_options={"num_cpus": 0.1})
    limits = Limits(requests_per_minute=settings.requests_per_minute)
    return page(serve.ingress()(Page)).bind(champions, token, settings.allowed_host, limits)


def serve_champions(settings: ServeSettings) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code.

    Raises ValueError or OSError, in one line, if there is nothing to serve, or no cluster.
    """
    token, is_own = page_token()
    found = champions_of(settings)  # what is wrong with it is said before anything starts
    if not found:
        raise ValueError("no champion to serve; check --name and --storage, or --alias and --tracking-uri.")
    connect(settings.address)
    serve.start(http_options={"host": LOOPBACK, "port": settings.port})
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    try:
        serve.run(application(settings, token), name=APPLICATION)
        address = f"http://{LOOPBACK}:{settings.port}/"
        say(f"serves {', '.join(sorted(found))} at {address}{'' if is_own else f'#token={token}'}  (Ctrl-C ends it)")
        ending.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0
