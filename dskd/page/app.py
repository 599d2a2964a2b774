"""The application: the page itself, and what it asks for, over any `Inspector`."""

import time
import unicodedata
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from dskd.calibration import p_value
from dskd.draw.verdict import TOP
from dskd.page.guard import Guard, Limits, refusal_document
from dskd.page.inspector import DEFAULT_RATE, Category, Inspector, Judged, Photo, Question, Refusal
from dskd.page.metrics import Metrics
from dskd.page.panel import palette

FILES = Path(__file__).with_name("static")
_MAX_NAME = 200
_KNOWN_PARAMETERS = frozenset({"false_alarm_rate", "threshold", "maps"})


def make_app(
    inspector: Inspector, *, token: str | None, hosts: tuple[str, ...] = (), limits: Limits | None = None
) -> ASGIApp:
    """The guarded application: `/` (the page), `/categories`, `/inspect/<category>`, `/feedback/<category>`,
    `/health`, `/metrics`.

    All but the page and `/health` need the `token`, unless it is None. Answers are JSON, and have the status 2xx, 4xx
    or 503.
    """
    limits = limits or Limits()
    metrics = Metrics()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.exception_handler(Refusal)(lambda request, refusal: _refused(refusal))
    app.exception_handler(HTTPException)(lambda request, error: _refused(_of_framework(error)))
    app.exception_handler(RequestValidationError)(lambda request, error: _refused(_of_validation(error)))

    # Answered here, since the framework's own answer is a bare 500; the guard logs what it was.
    app.exception_handler(Exception)(
        lambda request, error: _refused(Refusal(503, "This could not be done; the server's log says why."))
    )

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(FILES / "page.html", media_type="text/html")

    @app.get("/static/page.css")
    async def style() -> FileResponse:
        return FileResponse(FILES / "page.css", media_type="text/css")

    @app.get("/static/page.js")
    async def script() -> FileResponse:
        return FileResponse(FILES / "page.js", media_type="text/javascript")

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """200 where images can be judged, else 503."""
        known = await inspector.categories()
        if not known:
            raise Refusal(503, "No detector is loaded yet.")
        return {"status": "ok", "num_categories": len(known)}

    @app.get("/categories")
    async def categories() -> dict[str, Any]:
        known = await inspector.categories()
        return {
            "categories": [_category_document(each) for each in known],
            "palette": palette(),
            "palette_top": TOP,
            "limits": {"images": limits.images, "image_bytes": limits.image_bytes},
        }

    @app.post("/inspect/{category}")
    async def inspect(
        request: Request,
        category: str,
        false_alarm_rate: Annotated[float, Query(gt=0, lt=1, allow_inf_nan=False)] = DEFAULT_RATE,
        threshold: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        maps: bool = False,
    ) -> dict[str, Any]:
        """Verdicts on the files `images` of a form, in order, in the words of `Prediction.to_dict`.

        422 where no image can be read; `details` then says why for each.
        """
        if unknown := set(request.query_params) - _KNOWN_PARAMETERS:
            raise Refusal(
                422, f"Unknown parameter {sorted(unknown)[0]!r}; there are: {', '.join(sorted(_KNOWN_PARAMETERS))}."
            )
        started = time.perf_counter()
        photos = await _photos(request, limits)
        rows = await inspector.inspect([Question(category, each, false_alarm_rate, threshold, maps) for each in photos])
        metrics.count_inspection(category, rows, time.perf_counter() - started)
        if all(row["error"] for row in rows):
            details = [str(row["error"]) for row in rows]
            raise Refusal(422, details[0] if len(details) == 1 else "None of these images can be judged.", details)
        return {"predictions": rows}

    @app.post("/feedback/{category}", status_code=201)
    async def feedback(request: Request, category: str, judged: str) -> dict[str, Any]:
        """Take the one image of a form into quarantine, as `judged` says: good or defect."""
        if judged not in get_args(Judged):
            raise Refusal(422, f"judged must be good or defect, got {judged[:40]!r}.")
        photos = await _photos(request, limits)
        if len(photos) != 1:
            raise Refusal(422, f"Expected one image, got {len(photos)}.")
        note = await inspector.keep_feedback(category, photos[0], judged)  # type: ignore[arg-type]
        metrics.count_feedback(category, judged)
        return {"kept": note}

    @app.get("/metrics")
    async def measured() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(await inspector.categories()), media_type="text/plain; version=0.0.4")

    return Guard(app, token=token, hosts=hosts, limits=limits, on_answer=metrics.count_request)


def _category_document(category: Category) -> dict[str, Any]:
    """The category, and for each good image's score its p-value's place: scores in order."""
    return {
        **category._asdict(),
        "threshold": category.threshold._asdict(),
        "thresholds": [each._asdict() for each in category.thresholds],
        "normal_scores": sorted(category.normal_scores),
        "lowest_p_value": p_value(category.normal_scores, float("inf")) if category.normal_scores else None,
    }


async def _photos(request: Request, limits: Limits) -> list[Photo]:
    """The files of the form field `images`; raises `Refusal` where there are none, too many, or too large ones."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "Expected a form with files (multipart/form-data) in the field images.")
    form: FormData
    async with request.form(max_files=limits.images, max_fields=8) as form:
        given = form.multi_items()
        if wrong := next((name for name, each in given if name != "images" or not isinstance(each, UploadFile)), None):
            raise Refusal(422, f"Unexpected field {wrong[:40]!r}; files go into the field images.")
        photos: list[Photo] = []
        for _, upload in given:
            assert isinstance(upload, UploadFile)
            content = await upload.read()
            name = shown_name(upload.filename or "", len(photos))
            if len(content) > limits.image_bytes:
                raise Refusal(
                    413, f"{name} has {len(content) / 2**20:.0f} MiB; {limits.image_bytes / 2**20:g} MiB are allowed."
                )
            if not content:
                raise Refusal(422, f"{name} is empty.")
            photos.append(Photo(name, content))
    if not photos:
        raise Refusal(422, "No image was sent; files go into the field images.")
    return photos


def shown_name(name: str, number: int) -> str:
    """A sender's file name as it is repeated: one line without folders; "image N" where nothing is left of it.

    >>> shown_name("../../etc/pass\\nwd", 0)
    'passwd'
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(sign for sign in last if unicodedata.category(sign)[0] != "C")
    return kept[:_MAX_NAME].strip() or f"image {number}"


def _refused(refusal: Refusal) -> JSONResponse:
    headers = {"retry-after": "5"} if refusal.status in (429, 503) else None
    return JSONResponse(refusal_document(refusal), refusal.status, headers)


def _of_framework(error: HTTPException) -> Refusal:
    sentences = {404: "There is no such page.", 405: "This page does not take such a request."}
    status = error.status_code if 400 <= error.status_code < 500 else 503
    return Refusal(status, sentences.get(status, f"The request cannot be read: {error.detail}"))


def _of_validation(error: RequestValidationError) -> Refusal:
    first = error.errors()[0]
    return Refusal(422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.")
