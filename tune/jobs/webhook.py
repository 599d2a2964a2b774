"""Tells another system, by one HTTP request, that a search has ended."""

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from tune.storage.shown import host_of

_SECONDS = 10.0


def call_webhook(url: str, document: Mapping[str, Any]) -> str:
    """POST the document as JSON; returns a remark, empty if it was taken. Never raises: the search has ended anyway."""
    body = json.dumps(document).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return ""
    except (OSError, ValueError) as error:  # HTTP's own errors are OSErrors
        reason = getattr(error, "reason", None) or error
        return f"the webhook at {host_of(url)} was not told: {type(error).__name__}: {reason}"
