"""Who may ask what: token, Host, Origin, sizes, time and rate are checked before anything else of a request is read."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dskd.page.inspector import Refusal

OPEN_ROUTES = ("/", "/health", "/static/page.css", "/static/page.js", "/favicon.ico")
"""Need no token: they tell nothing of any image."""
HEADERS = {
    # nothing from elsewhere, no inline script: a file name that got past everything else could still run nothing
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_CLIENTS = 10_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request, and one sender, may ask for."""

    request_bytes: int = 256 * 2**20
    image_bytes: int = 64 * 2**20
    images: int = 64
    """Of one request."""
    seconds: float = 60.0
    """To send a request in full."""
    requests_per_minute: float = 1200.0
    """Of one address."""
    burst: int = 200
    """Requests of one address at once."""
    requests_at_once: int = 256
    """Of all addresses; more are answered with 503."""


class Guard:
    """ASGI middleware around the application; every answer of 4xx or 503 has the same JSON form.

    `token` None asks for none. `hosts` are names, without port, under which the application may be addressed beside
    loopback's.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Iterable[str] = (),
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_answer: Callable[[str, int], object] = lambda route, status: None,
    ) -> None:
        self._app, self._token = app, token
        self._hosts = {host.lower() for host in (*_LOOPBACK, *hosts)}
        self._limits = limits or Limits()
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._at_once = 0
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no WebSockets: the server then closes them
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *((name, value) for name, value in message["headers"] if name.decode().lower() not in HEADERS),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
                self._on_answer(_route(scope), message["status"])
            await send(message)

        self._at_once += 1
        try:
            self._check(scope)
            await self._app(scope, self._limited(receive), sending)
        except Refusal as refusal:
            if not started:
                await send_refusal(refusal, sending)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception:
            _log.exception("a request failed")
            if not started:
                await send_refusal(Refusal(503, "This could not be done; the server's log says why."), sending)
        finally:
            self._at_once -= 1

    def _check(self, scope: Scope) -> None:
        """Raise `Refusal` where headers alone tell that this request is not answered."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        self._check_rate(str((scope.get("client") or ("",))[0]))
        if self._at_once > self._limits.requests_at_once:
            raise Refusal(503, "Too many requests at once; send this one again in a few seconds.")
        hosts = headers.get("host", [])
        if len(hosts) != 1 or _host_of(f"//{hosts[0]}") not in self._hosts:
            raise Refusal(
                400, "This name of the host is not served here; a proxy's name is allowed with --allowed-host."
            )
        for origin in headers.get("origin", []):
            if _netloc_of(origin) != hosts[0].lower() and _host_of(origin) not in self._hosts - set(_LOOPBACK):
                raise Refusal(403, "Pages of another site may not ask this server.")
        if self._token is not None and scope["path"] not in OPEN_ROUTES:
            self._check_token(headers.get("authorization", []), self._token)
        lengths = headers.get("content-length", ["0"])
        if len(lengths) != 1 or not lengths[0].isdigit():
            raise Refusal(400, "The header Content-Length must be one number.")
        if int(lengths[0]) > self._limits.request_bytes:
            raise self._too_large()

    def _check_token(self, given: Sequence[str], token: str) -> None:
        kind, _, said = (given[0] if len(given) == 1 else "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(said.strip().encode("latin-1"), token.encode()):
            raise Refusal(401, "This needs the server's token, which it printed at its start: Authorization: Bearer …")

    def _check_rate(self, client: str) -> None:
        """A bucket that fills with time: each request of an address takes one from it."""
        now, limits = self._clock(), self._limits
        left, since = self._buckets.pop(client, (float(limits.burst), now))
        left = min(limits.burst, left + (now - since) * limits.requests_per_minute / 60)
        self._buckets[client] = (max(left - 1, 0.0), now)
        if len(self._buckets) > _MAX_CLIENTS:
            del self._buckets[next(iter(self._buckets))]  # the one that asked longest ago
        if left < 1:
            raise Refusal(429, "Too many requests from this address; wait a minute.")

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which refuses a body that is too large or comes too slowly."""
        num_bytes, is_whole = 0, False
        end = asyncio.get_running_loop().time() + self._limits.seconds

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()  # waits for the sender to go
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, f"The request did not come in {self._limits.seconds:g} seconds.") from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._limits.request_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"A request may have {self._limits.request_bytes / 2**20:g} MiB; send fewer images at once."
        )


def refusal_document(refusal: Refusal) -> dict[str, object]:
    """The one form of all answers that are no success."""
    return {"error": {"status": refusal.status, "message": refusal.sentence, "details": list(refusal.details)}}


async def send_refusal(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal_document(refusal)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status in (429, 503):
        headers.append((b"retry-after", b"5"))
    if refusal.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _netloc_of(origin: str) -> str:
    """Host and port of an origin, in lower case; empty where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_of(address: str) -> str:
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:
        return ""


def _route(scope: Scope) -> str:
    """The route's pattern, never the path itself, of which there are as many as a sender likes."""
    route = scope.get("route")
    return str(getattr(route, "path", "")) or (scope["path"] if scope["path"] in OPEN_ROUTES else "other")
