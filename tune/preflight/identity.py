"""What makes two starts of a search the same search: recorded when it begins, compared when it goes on.

Tune continues with what its first start was told, whatever the later ones say; so these must agree in all
that decides a result, or be refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tune.settings.plan import SearchPlan
from tune.storage.files import Storage

_FOLDER = "identity"


def identity(plan: SearchPlan, category: str) -> dict[str, Any]:
    """Plain values of all that decides what the trials of one category are, but not how many."""
    return {
        "schema": 1,
        "preset": list(plan.configs),
        "data": plan.data,
        "teacher_weights": plan.teacher.name,
        "textures": plan.textures,
        "selection": plan.selection,
        "sampler": plan.sampler,
        "seed": plan.seed,
        "start_from": list(plan.earlier_searches),
        "workers_per_trial": plan.num_workers,
        "min_workers_per_trial": plan.min_workers,
        "cpus_per_worker": plan.cpus_per_worker,
        "space": plan.spaces[category].to_plain(),
    }


def check_continues(storage: Storage, plan: SearchPlan) -> None:
    """Raise ValueError where a category was searched under this name with something else asked for."""
    for category in plan.categories:
        _compare(storage, category, identity(plan, category), plan.name)


def record(storage: Storage, plan: SearchPlan, gpus_per_worker: float) -> None:
    """Write down what is searched, GPUs included now that the cluster is known, where that is not known yet.

    Raises ValueError as `check_continues`.
    """
    for category in plan.categories:
        mine = identity(plan, category) | {"gpus_per_worker": gpus_per_worker}
        if not _compare(storage, category, mine, plan.name):
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
                f"search {name!r} of {category} was begun with {field} {_quoted(there.get(path))}, got "
                f"{_quoted(here.get(path))}; continue it with what it was begun with, or give another --name."
            )
    return True


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", list(value) if isinstance(value, tuple) else value


def _quoted(value: Any) -> str:
    return "none" if value is None else repr(value)
