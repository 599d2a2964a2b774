"""A search resolved from its flags and the names of its data, before anything else is looked at."""

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
    """What the flags and the data of a search say."""

    settings: SearchSettings
    addresses: Addresses
    root: Path | None
    """Folder in which the data's names can be read; None where the data cannot be listed."""
    plan: SearchPlan | None
    """None where `errors` say why not."""
    errors: tuple[str, ...]


@contextmanager
def drafted(settings: SearchSettings) -> Iterator[Draft]:
    """Resolve the settings once; the draft's `root` stands until the block ends."""
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
            errors = in_the_users_words(str(error), root, settings.data).splitlines()
            ambiguous = [place.fault for place in scan(root) if place.fault] if root.is_dir() else []
            errors += [fault for fault in ambiguous if fault not in errors]
        yield Draft(settings, addresses, root, plan, tuple(errors))


def in_the_users_words(text: str, root: Path, data: str) -> str:
    """An error with the address of the data in place of the folder that outlines it on this machine."""
    return text.replace(str(root), data.rstrip("/")) if is_address(data) else text
