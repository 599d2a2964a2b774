"""A TCP connection to a server that can be cut, slow, silent, or answered by an overloaded gateway instead."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SLOW_SECONDS = 2.0
"""What a slow link adds to each request."""
_SAME_REQUEST_SECONDS = 0.3
"""Bytes that follow others sooner belong to the same request."""


class FaultyLink:
    """Listens on a port of its own and passes everything on to a server, as its `state` says.

    "sound"; "cut": connections are closed at once; "503": answered with that status; "slow": each request waits;
    "silent": connections stay open, and nothing passes.
    """

    def __init__(self, host: str, port: int) -> None:
        self.state = "sound"
        self.num_refused = 0
        """Connections that were cut or answered with 503."""
        link = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if link.state == "cut":
                    link.num_refused += 1
                    return
                if link.state == "503":
                    link.num_refused += 1
                    self.request.recv(1 << 16)
                    self.request.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                with suppress(OSError), socket.create_connection((host, port)) as server:
                    back = threading.Thread(target=link._carry, args=(server, self.request, False), daemon=True)
                    back.start()
                    link._carry(self.request, server, True)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        last = 0.0
        with suppress(OSError):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a link adds nothing unless it is told to
            while data := source.recv(1 << 16):
                if self.state in ("cut", "503"):
                    break
                if self.state == "slow" and is_request and time.monotonic() - last > _SAME_REQUEST_SECONDS:
                    time.sleep(SLOW_SECONDS)
                while self.state == "silent":
                    time.sleep(0.1)
                last = time.monotonic()
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def faulty(self, state: str, seconds: float) -> Iterator[None]:
        """Faulty from now on, for so many seconds; waits for their end."""
        self.state = state
        timer = threading.Timer(seconds, setattr, (self, "state", "sound"))
        timer.start()
        yield
        timer.join()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
