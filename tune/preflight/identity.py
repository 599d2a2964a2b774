"""What makes two starts of a search the same search: recorded when it begins, compared when it goes on.

Tune continues with what its first start was told, whatever the later ones say; so these must agree in all
that decides a result, or be refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tune.settings.search import SearchSettings
from tune.settings.space import Space
from tune.storage.files import Storage
from tune.storage.uris import absolute

_FOLDER = "identity"


def identity(settings: SearchSettings, space: Space) -> dict[str, Any]:
    """Plain values of all that decides what the trials of one category are, but not how many."""
    weights = settings.teacher_weights
    return {
        "schema": 1,
        "preset": list(settings.run_configs()),
        "data": absolute(settings.data),
        "teacher_weights": weights if weights in ("hub", "random") else Path(weights).name,
        "textures": str(settings.textures.absolute()) if settings.textures else "",
        "selection": settings.selection,
        "sampler": settings.sampler,
        "seed": settings.seed,
        "start_from": list(settings.earlier_searches),
        "workers_per_trial": settings.workers_per_trial,
        "min_workers_per_trial": settings.min_workers_per_trial,
        "cpus_per_worker": settings.cpus_per_worker,
        "space": space.to_plain(),
    }


def check_continues(storage: Storage, settings: SearchSettings, spaces: Mapping[str, Space]) -> None:
    """Raise ValueError where a category was searched under this name with something else asked for."""
    for category, space in spaces.items():
        _compare(storage, category, identity(settings, space), settings.name)


def record(storage: Storage, settings: SearchSettings, spaces: Mapping[str, Space], gpus_per_worker: float) -> None:
    """Write down what is searched, GPUs included now that the cluster is known, where that is not known yet.

    Raises ValueError as `check_continues`.
    """
    for category, space in spaces.items():
        mine = identity(settings, space) | {"gpus_per_worker": gpus_per_worker}
        if not _compare(storage, category, mine, settings.name):
            storage.write_json(f"{_FOLDER}/{category}.json", mine)


def _compare(storage: Storage, category: str, mine: Mapping[str, Any], name: str) -> bool:
    """Whether the category was begun before, as the same; ValueError where as another."""
    known = storage.read_json(f"{_FOLDER}/{category}.json")
    if known is None:
        return False
    here, there = dict(_flat(mine)), dict(_flat({key: known.get(key) for key in mine}))
    for path in {**here, **there}:
        if here.get(path) != there.get(path):
            *_, section, field = ["", *path.split("/")]
            if "/dimensions/" in path:
                field = f"{field} of {section}"
            raise ValueError(
                f"search {name!r} of {category} was begun with {field} {_shown(there.get(path))}, got "
                f"{_shown(here.get(path))}; continue it with what it was begun with, or give another --name."
            )
    return True


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)
