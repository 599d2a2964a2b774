"""The page on this machine alone: detectors of folders behind uvicorn, on loopback."""

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from dskd.config import Precision
from dskd.page.app import make_app
from dskd.page.bench import Bench
from dskd.page.guard import Limits

TOKEN = "DSKD_PAGE_TOKEN"
"""Environment variable with a token of one's own; else one is drawn at each start."""
MIN_TOKEN = 16
MEGAPIXELS = 100.0
"""The largest image that the page takes, unless more is allowed: one of 20,000 x 20,000 would take 5 GB to decode."""
LOOPBACK = "127.0.0.1"


def serve_page(
    folders: Sequence[Path],
    *,
    port: int,
    device: str,
    precision: Precision = "float32",
    hosts: tuple[str, ...] = (),
    limits: Limits | None = None,
    say: Callable[[str], object],
    on_start: Callable[[uvicorn.Server], object] = lambda server: None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; `port` 0 takes a free one.

    Raises ValueError as `Bench`, on a token that is too short, and OSError where the port is taken.
    """
    token, is_own = page_token()
    bench = Bench(folders, device, precision)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
    except OSError as error:
        raise OSError(f"port {port} of {LOOPBACK} cannot be taken ({error.strerror}); choose another --port.") from None
    config = uvicorn.Config(
        make_app(bench, token=token, hosts=hosts, limits=limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # what a client says of itself must not decide its rate
        ws="none",
        lifespan="off",
    )
    server = uvicorn.Server(config)
    on_start(server)
    address = f"http://{LOOPBACK}:{listening.getsockname()[1]}/"
    # In the fragment, which a browser sends to nobody; one's own token is never printed.
    say(f"the page: {address}{'' if is_own else f'#token={token}'}  (Ctrl-C ends it)")
    with listening, bench.working():
        server.run(sockets=[listening])


def page_token() -> tuple[str, bool]:
    """The token, and whether it is the environment's own; else it is new. Raises ValueError on one easily guessed."""
    given = os.environ.get(TOKEN)
    if given is None:
        return secrets.token_urlsafe(24), False
    if len(given) < MIN_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(f"${TOKEN} must have at least {MIN_TOKEN} letters and digits; leave it out, and one is drawn.")
    return given, True
