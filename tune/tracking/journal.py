"""Events on disk while the tracking server has not taken them: a killed driver loses none."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from tune.tracking.events import KINDS, Event

logger = logging.getLogger(__name__)


class Journal:
    """A file of events, a line of JSON each; there is no file where there are none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Event]:
        """The events in their order; one that was cut off in writing is left out, with a warning."""
        text = self.path.read_text() if self.path.is_file() else ""
        if text and not text.endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")  # what is added must not continue the line that was cut off
        events: list[Event] = []
        for line in text.splitlines():
            try:
                fields = json.loads(line)
                events.append(KINDS[fields.pop("event")](**fields))
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s holds a line that is no event, left out: %.80s", self.path, line)
        return events

    def add(self, events: Iterable[Event]) -> None:
        """Append events; on a disk that has no room they are in memory alone, with a warning."""
        lines = [json.dumps({"event": type(event).__name__, **event._asdict()}) + "\n" for event in events]
        try:
            with self.path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            logger.warning("%d events for MLflow are in memory alone: %s", len(lines), error)

    def clear(self) -> None:
        """Everything has arrived."""
        self.path.unlink(missing_ok=True)
