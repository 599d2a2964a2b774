"""Events kept on disk while the tracking server is away, so that a killed driver loses none."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from tune.tracking.events import KINDS, Event

logger = logging.getLogger(__name__)


class Journal:
    """A file of events, one line of JSON each; the file exists only while there are events."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Event]:
        """The events in order; an incomplete line is skipped with a warning."""
        text = self.path.read_text() if self.path.is_file() else ""
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")  # the next event must not continue an incomplete line
        events: list[Event] = []
        for line in text.splitlines():
            try:
                fields = json.loads(line)
                events.append(KINDS[fields.pop("event")](**fields))
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s holds a line that is no event, left out: %.80s", self.path, line)
        return events

    def add(self, events: Iterable[Event]) -> None:
        """Append events; if the disk is full they stay only in memory, with a warning."""
        lines = [json.dumps({"event": type(event).__name__, **event._asdict()}) + "\n" for event in events]
        try:
            with self.path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            logger.warning("%d events for MLflow are kept only in memory: %s", len(lines), error)

    def clear(self) -> None:
        """Remove the file: all events have been written to MLflow."""
        self.path.unlink(missing_ok=True)
