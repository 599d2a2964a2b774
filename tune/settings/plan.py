"""A search with all flags, files and data names resolved: read once, then passed on unchanged."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dskd.config import RunConfig, Selection, TeacherSource
from dskd.data.datasets import find_categories
from dskd.data.exclusions import read_exclusions
from tune.settings.search import Promote, SamplerName, SearchSettings, split_words
from tune.settings.space import Space, build_space
from tune.settings.space_file import read_space
from tune.storage.files import Storage
from tune.storage.uris import Addresses, absolute

if TYPE_CHECKING:
    from tune.storage.inputs import CategoryInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """Categories, spaces, configurations and addresses of a search; plain values that Ray can send to other nodes."""

    data: str
    """Absolute folder or s3:// address."""
    categories: tuple[str, ...]
    spaces: Mapping[str, Space]
    """Search space by category, without the champions of earlier searches."""
    configs: Mapping[str, RunConfig]
    """Configuration by preset, in the given order; all have the same image size, batch size and number of reports."""
    addresses: Addresses
    studies: str = field(repr=False)
    """URL of Optuna's storage, which may hold a password."""
    ray_address: str | None
    """None: start a cluster on this machine, for this search only."""
    teacher: TeacherSource
    textures: str
    """Absolute folder of texture images for the synthetic defects; empty: textures are drawn."""
    exclude: tuple[str, ...]
    """Good images that are left out, by file name or by the end of their path."""
    selection: Selection
    sampler: SamplerName
    seed: int
    trials: int
    budget_seconds: float | None
    wait_seconds: float
    """Seconds to wait for nodes that nothing promises."""
    earlier_searches: tuple[str, ...]
    num_workers: int
    min_workers: int | None
    cpus_per_worker: float
    gpus_per_worker: float | None
    """None: 1 if the cluster has GPUs, else 0."""
    trials_per_gpu: int
    """Trials that share a worker."""
    max_concurrent: int | None
    """None: as many trials as the cluster can hold at that time."""
    cache_gb: float
    promote: Promote
    finalists: int
    """Trials of a category that are trained on the other folds too."""
    min_gain_errors: float
    """Standard errors by which a finalist must be ahead of the untuned preset."""
    study_names: Mapping[str, str] = field(default_factory=dict)
    """Name of each category's study in Optuna's storage, once it is recorded."""
    owner: str = ""
    """Who holds the lease under which the search runs; empty before it is taken."""
    generation: int = 0
    """Number of that lease; each start of the search has the next one."""

    @property
    def name(self) -> str:
        return self.addresses.name

    def study_name(self, category: str) -> str:
        """Name of the category's study; by default that of searches before names were recorded."""
        return self.study_names.get(category, f"{self.name}/{category}")

    @property
    def has_own_studies(self) -> bool:
        """Whether Optuna's storage is a file that no search from another storage uses."""
        return self.studies == _embedded_studies(self.addresses)

    @property
    def config(self) -> RunConfig:
        """The configuration that trials vary; with several presets, that of the first."""
        return next(iter(self.configs.values()))

    @property
    def teachers(self) -> dict[str, RunConfig]:
        """The backbones that trials may have, each with a configuration of it, over all categories."""
        found: dict[str, RunConfig] = {}
        for space in self.spaces.values():
            for base in space.bases.values():
                found.setdefault(base.model.backbone, base)
        return found

    @property
    def num_reports(self) -> int:
        """Reports of a trial that is not pruned, one after each validation; what `EPOCH` counts."""
        return self.config.train.num_validations

    def inputs_of(self, category: str) -> "CategoryInputs":
        """What is recorded of the files that the category's trials read."""
        from tune.storage.inputs import CategoryInputs, Inputs  # numpy, which a cluster is asked for room without

        layout = self.config.data.layout
        inputs = Inputs(self.data, layout, self.exclude, self.teacher, self.textures)
        return CategoryInputs(Storage(self.addresses.home), self.name, category, inputs)

    def of_category(self, category: str, space: Space) -> "SearchPlan":
        """The part of the plan that the process of one category needs."""
        return dataclasses.replace(self, categories=(category,), spaces={category: space})


def plan_search(settings: SearchSettings, addresses: Addresses, root: Path) -> SearchPlan:
    """Resolve the settings of a search; `root` is a folder with the file names of the data.

    Raises ValueError on an unknown category, or with file and entry where --space is invalid.
    """
    configs = settings.run_configs()
    known = find_categories(root, next(iter(configs.values())).data.layout)
    categories = _chosen_categories(settings, tuple(known))
    return SearchPlan(
        data=absolute(settings.data),
        categories=categories,
        spaces=_with_shared_points(_spaces(settings, configs, categories, tuple(known)), settings, configs),
        configs=configs,
        addresses=addresses,
        studies=resolve_studies(settings, addresses),
        ray_address=settings.address,
        teacher=TeacherSource(settings.teacher_weights).absolute(),
        textures=str(settings.textures.absolute()) if settings.textures else "",
        exclude=read_exclusions(settings.exclude) if settings.exclude else (),
        selection=settings.selection,
        sampler=settings.sampler,
        seed=settings.seed,
        trials=settings.trials,
        budget_seconds=settings.budget_seconds(),
        wait_seconds=settings.wait_seconds(),
        earlier_searches=split_words(settings.start_from),
        num_workers=settings.workers_per_trial,
        min_workers=settings.min_workers_per_trial,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=settings.gpus_per_worker,
        trials_per_gpu=settings.trials_per_gpu,
        max_concurrent=settings.max_concurrent,
        cache_gb=settings.cache_gb,
        promote=settings.promote,
        finalists=settings.finalists if configs_have_folds(configs) else 0,
        min_gain_errors=settings.min_gain_errors,
    )


def configs_have_folds(configs: Mapping[str, RunConfig]) -> bool:
    """Whether the good images are to be cut into folds."""
    return all(config.data.folds > 0 for config in configs.values())


def resolve_addresses(settings: SearchSettings) -> Addresses:
    """Addresses of storage and MLflow of a search; nothing is opened."""
    return Addresses.resolve(settings.storage, settings.name, settings.tracking_uri)


def resolve_studies(settings: SearchSettings, addresses: Addresses) -> str:
    """URL of Optuna's storage: as given, else an SQLite file in the local storage folder."""
    return settings.study_storage or _embedded_studies(addresses)


def _embedded_studies(addresses: Addresses) -> str:
    return f"sqlite:///{addresses.storage}/optuna.db"


def _with_shared_points(
    spaces: Mapping[str, Space], settings: SearchSettings, configs: Mapping[str, RunConfig]
) -> dict[str, Space]:
    """The spaces with the points that several categories try, a half of the trials, if finalists are compared."""
    if len(spaces) < 2 or settings.finalists < 1 or not configs_have_folds(configs):
        return dict(spaces)
    points = next(iter(spaces.values())).shareable_points(max(1, settings.trials // 2), settings.seed)
    held = {category: tuple(point for point in points if space.holds(point)) for category, space in spaces.items()}
    return {category: dataclasses.replace(space, shared=held[category]) for category, space in spaces.items()}


def _chosen_categories(settings: SearchSettings, known: tuple[str, ...]) -> tuple[str, ...]:
    """The categories to search, in the given order."""
    if settings.categories == "all":
        return known
    wanted = split_words(settings.categories)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no category {unknown[0]!r} in {settings.data}; it holds: {', '.join(known)}.")
    if not wanted:
        raise ValueError("--categories names none; give names separated by commas, or all.")
    return wanted


def _spaces(
    settings: SearchSettings, configs: Mapping[str, RunConfig], categories: tuple[str, ...], known: tuple[str, ...]
) -> dict[str, Space]:
    if settings.space is None:
        return dict.fromkeys(categories, build_space(configs))
    file = read_space(settings.space)
    file.check_names(tuple(configs), known)

    def with_teacher(base: RunConfig, preset: str, backbone: str) -> RunConfig:
        return settings.run_configs(backbone)[preset]

    general = file.space(configs, "", with_teacher)
    spaces = {
        category: file.space(configs, category, with_teacher) if category in file.by_category else general
        for category in categories
    }
    most = max(len(space.bases) for space in spaces.values())
    if settings.trials < most:
        raise ValueError(
            f"--trials {settings.trials} cannot hold the {most} presets and backbones untuned, which come first; give "
            f"at least {most}."
        )
    if most > 1 and settings.sampler not in ("tpe", "random"):
        raise ValueError(
            f"--sampler {settings.sampler} cannot search several backbones, whose parameters differ; use tpe or random."
        )
    return spaces
