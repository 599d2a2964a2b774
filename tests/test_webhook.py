"""What is told to another system when a search has ended."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tune.jobs.webhook import call_webhook
from tune.settings.search import SearchSettings


@pytest.fixture
def listener() -> Iterator[tuple[str, list[Any]]]:
    """A server that takes documents, and refuses those below /full."""
    taken: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(507 if self.path == "/full" else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", taken
        server.shutdown()
        thread.join()


def test_the_document_arrives_whole(listener: tuple[str, list[Any]]) -> None:
    address, taken = listener
    document = {"name": "parts", "status": "finished", "categories": [{"category": "übung"}]}
    assert call_webhook(f"{address}/hooks/secret", document) == "" and taken == [document]


def test_a_system_that_is_away_or_refuses_costs_one_line_without_its_path(listener: tuple[str, list[Any]]) -> None:
    address, _ = listener
    refused = call_webhook(f"{address}/full", {})
    assert refused.startswith("the webhook at 127.0.0.1 was not told: HTTPError: ") and "full" not in refused
    nobody = call_webhook("http://127.0.0.1:9/hooks/secret", {})
    assert nobody.startswith("the webhook at 127.0.0.1 was not told: URLError: ") and "secret" not in nobody


@pytest.mark.parametrize("wrong", ["ftp://host/secret", "http://", "secret", "http://[secret"])
def test_what_is_no_address_is_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^--webhook must be an http:// or https:// address") as raised:
        SearchSettings(data="data", teacher_weights="random", webhook=wrong)
    assert "secret" not in str(raised.value)


def test_the_address_may_come_from_the_environment_and_is_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSKD_WEBHOOK", "https://host/secret")
    settings = SearchSettings(data="data", teacher_weights="random")
    assert settings.webhook == "https://host/secret" and "secret" not in repr(settings)
