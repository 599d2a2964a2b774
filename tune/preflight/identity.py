"""The settings that two starts of the same search must share: recorded at the first start, compared at later ones.

Its trials are compared with each other, so a later start that differs in anything that affects a result is refused.
"""

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from dskd.config import RunConfig
from tune.settings.plan import SearchPlan
from tune.storage.files import Storage

_FOLDER = "identity"


def identity(plan: SearchPlan, category: str) -> dict[str, Any]:
    """Plain values of everything that affects the trials of one category, except their number."""
    return {
        "schema": 1,
        "preset": list(plan.configs),
        "data": plan.data,
        "teacher_weights": plan.teacher.name,
        "textures": plan.textures,
        "exclude": list(plan.exclude) or None,
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
    """Raise ValueError if a category was searched under this name with other settings, or without records of trials."""
    for category in plan.categories:
        if storage.names(f"tune/{category}") and not storage.names(f"trials/{category}"):
            raise ValueError(
                f"search {plan.name!r} of {category} was begun by a version that kept Ray Tune's own state, which this "
                f"one does not read; begin a new search, --name {plan.name}-2, with --start-from {plan.name}."
            )
        _compare(storage, category, identity(plan, category), plan.name)


def record(storage: Storage, plan: SearchPlan, gpus_per_worker: float) -> dict[str, str]:
    """Record the settings of each category at its first start, including GPUs, now that the cluster is known.

    Returns the name of each category's study. In a database that several storages may use it has a part of its own,
    so that two searches of one name do not meet there. Raises ValueError as `check_continues`.
    """
    names = {}
    for category in plan.categories:
        mine = identity(plan, category) | {"gpus_per_worker": gpus_per_worker}
        file = f"{_FOLDER}/{category}.json"
        if _compare(storage, category, mine, plan.name):
            known = storage.read_json(file) or {}
            names[category] = str(known.get("study", plan.study_name(category)))
        else:
            own = "" if plan.has_own_studies else f"/{secrets.token_hex(4)}"
            names[category] = f"{plan.study_name(category)}{own}"
            storage.write_json(file, mine | {"study": names[category]})
    return names


def _compare(storage: Storage, category: str, mine: Mapping[str, Any], name: str) -> bool:
    """Whether the category was started before; raises ValueError if with other settings."""
    known = storage.read_json(f"{_FOLDER}/{category}.json")
    if known is None:
        return False
    here, there = dict(_flat(mine)), dict(_flat({key: known.get(key) for key in mine}))
    for path in {**here, **there}:
        if here.get(path) != there.get(path, _older(path)):
            *_, section, field = ["", *path.split("/")]
            if "/dimensions/" in path:
                field = f"{field} of {section}"
            raise ValueError(
                f"search {name!r} of {category} was begun with {field} {_quoted(there.get(path))}, got "
                f"{_quoted(here.get(path))}; continue it with what it was begun with, or give another --name."
            )
    return True


def _older(path: str) -> Any:
    """What a record stands for that is older than the field: the default, and before there were steps, epochs."""
    fields = RunConfig().flat() | {"steps": None}
    return fields.get(path.rpartition("/")[2]) if "/bases/" in path else None


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", list(value) if isinstance(value, tuple) else value


def _quoted(value: Any) -> str:
    return "none" if value is None else repr(value)
