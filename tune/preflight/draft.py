"""A search resolved from its flags and the file names of its data, before all other checks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from dskd.data.datasets import scan
from tune.settings.plan import SearchPlan, plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.storage.staging import outline
from tune.storage.uris import Addresses, is_address


class Draft(NamedTuple):
    """A search's settings, addresses and plan, or the errors found."""

    settings: SearchSettings
    addresses: Addresses
    root: Path | None
    """Folder with the file names of the data; None if the data cannot be listed."""
    plan: SearchPlan | None
    """None if there are `errors`."""
    errors: tuple[str, ...]


@contextmanager
def drafted(settings: SearchSettings) -> Iterator[Draft]:
    """Resolve the settings once; the draft's `root` exists until the block ends."""
    addresses = resolve_addresses(settings)
    with ExitStack() as opened:
        try:
            root = opened.enter_context(outline(settings.data))
        except (ValueError, OSError) as error:
            yield Draft(settings, addresses, None, None, tuple(str(error).splitlines()))
            return
        plan, errors = None, []
        try:
            plan = plan_search(settings, addresses, root)
        except (ValueError, OSError) as error:
            errors = with_user_address(str(error), root, settings.data).splitlines()
            is_auto = next(iter(settings.run_configs().values())).data.layout == "auto"
            ambiguous = [place.fault for place in scan(root) if place.fault] if is_auto and root.is_dir() else []
            errors += [fault for fault in ambiguous if fault not in errors]
        yield Draft(settings, addresses, root, plan, tuple(errors))


def with_user_address(text: str, root: Path, data: str) -> str:
    """The text with the data's address in place of the local `root` that stands for it."""
    return text.replace(str(root), data.rstrip("/")) if is_address(data) else text
