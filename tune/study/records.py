"""What is needed to go on with a category: a small JSON document for each of its trials, in the search's storage.

With Optuna's study, the trials' checkpoints and these a search goes on wherever its folder lies, and whatever version
of Ray it was begun with. Nothing of Ray Tune's own state is kept.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna

from tune.storage.files import Storage
from tune.tracking.events import Status
from tune.trial.spec import CHECKPOINT, EPOCH, ERROR, LOST, OBJECTIVE, RUNG, TRACKED

FOLDER = "trials"
_CONNECTIONS = 16
_KEPT = (CHECKPOINT, EPOCH, ERROR, LOST, OBJECTIVE, "timestamp")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial, from its suggestion on."""

    trial_id: str
    order: int
    """Its place among the trials of the category, from 1."""
    number: int
    """In Optuna's study."""
    suggested: Mapping[str, Any]
    """Values by name."""
    distributions: Mapping[str, str]
    """Of Optuna by name, as JSON; they make the trial anew in a study that lacks it."""
    is_enqueued: bool
    """Whether its values were given to the study, not drawn by it."""
    rungs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Objective at each rung that it has passed."""
    status: Status | None = None
    """How it ended; None: it goes on."""
    error: str = ""
    is_lost: bool = False
    """Whether its machines are to blame for its end, and not its own values."""
    last: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its last report, once it has ended; an address below the search's home is relative to that."""

    @classmethod
    def of(cls, trial_id: str, order: int, trial: optuna.trial.FrozenTrial) -> "TrialRecord":
        """The record of a trial that the study has just suggested."""
        distributions = trial.distributions.items()
        return cls(
            trial_id=trial_id,
            order=order,
            number=trial.number,
            suggested=dict(trial.params),
            distributions={name: optuna.distributions.distribution_to_json(each) for name, each in distributions},
            is_enqueued="fixed_params" in trial.system_attrs,
        )

    @property
    def objective(self) -> float | None:
        return float(self.last[OBJECTIVE]) if OBJECTIVE in self.last else None

    def with_rungs(self, reported: Mapping[str, Any]) -> "TrialRecord":
        """The record with the objectives at rungs that a report carries."""
        found = {name.removeprefix(RUNG): float(reported[name]) for name in reported if name.startswith(RUNG)}
        return dataclasses.replace(self, rungs={**self.rungs, **found})

    @property
    def state(self) -> optuna.trial.TrialState:
        """What the study is told of it."""
        states = optuna.trial.TrialState
        if self.status is None:
            return states.RUNNING
        if self.is_lost:
            return states.FAIL
        return states.PRUNED if self.status == "pruned" else states.COMPLETE

    def frozen(self) -> optuna.trial.FrozenTrial:
        """The trial as it would be in Optuna's study."""
        return optuna.trial.create_trial(
            state=self.state,
            value=(self.objective or 0.0) if self.status is not None and not self.is_lost else None,
            params=dict(self.suggested),
            distributions={
                name: optuna.distributions.json_to_distribution(text) for name, text in self.distributions.items()
            },
            system_attrs={"fixed_params": dict(self.suggested)} if self.is_enqueued else {},
        )


class TrialRecords:
    """The records of one category of a search; one process writes them."""

    def __init__(self, storage: Storage, category: str) -> None:
        """`storage`: the search's home."""
        self._storage, self._folder = storage, f"{FOLDER}/{category}"
        self._known: dict[str, TrialRecord] = {}

    def read(self) -> None:
        """Read what earlier processes have recorded."""
        names = [name for name in self._storage.names(self._folder) if name.endswith(".json")]
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="records") as pool:
            found = [each for each in pool.map(self._read, names) if each is not None]
        self._known = {each.trial_id: each for each in sorted(found, key=lambda each: each.order)}

    @property
    def all(self) -> list[TrialRecord]:
        """In the order of their suggestion."""
        return list(self._known.values())

    @property
    def ended(self) -> list[TrialRecord]:
        return [each for each in self.all if each.status is not None]

    @property
    def unfinished(self) -> list[TrialRecord]:
        return [each for each in self.all if each.status is None]

    def __getitem__(self, trial_id: str) -> TrialRecord:
        return self._known[trial_id]

    def __contains__(self, trial_id: object) -> bool:
        return trial_id in self._known

    def put(self, record: TrialRecord) -> None:
        """Write a record; unchanged ones are not written again."""
        if self._known.get(record.trial_id) == record:
            return
        self._known[record.trial_id] = record
        document = {"schema": 1, **dataclasses.asdict(record)}
        self._storage.write_json(f"{self._folder}/{record.trial_id}.json", document)

    def end(
        self, trial_id: str, status: Status, last: Mapping[str, Any], error: str = "", is_lost: bool = False
    ) -> None:
        """Record how a trial ended, and its last report."""
        plain = {name: value for name, value in last.items() if name in _KEPT or name.startswith(TRACKED)}
        if CHECKPOINT in plain:
            plain[CHECKPOINT] = str(plain[CHECKPOINT]).removeprefix(f"{self._storage.uri}/")
        record = self._known[trial_id].with_rungs(last)
        self.put(dataclasses.replace(record, status=status, error=error, is_lost=is_lost, last=plain))

    def address(self, path: str) -> str:
        """The address of a folder that a record names."""
        return path if path.startswith("/") or "://" in path else f"{self._storage.uri}/{path}"

    def _read(self, name: str) -> TrialRecord | None:
        document = self._storage.read_json(f"{self._folder}/{name}")
        if document is None:
            return None
        fields = {field.name for field in dataclasses.fields(TrialRecord)}
        return TrialRecord(**{field: value for field, value in document.items() if field in fields})


def complete_study(study: optuna.Study, records: TrialRecords) -> None:
    """Let the study say what the records say, which a process wrote that was killed before it told the study.

    Trials that it lacks, as where the search's folder was moved without Optuna's database, are added. A running trial
    that has no record is closed; its process was killed as it began.
    """
    state = optuna.trial.TrialState
    there = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for record in records.all:
        known = there.get(record.number)
        if known is None or dict(known.params) != dict(record.suggested):
            study.add_trial(record.frozen())
            number = study.get_trials(deepcopy=False)[-1].number
            records.put(dataclasses.replace(record, number=number))
        elif known.state == state.RUNNING and record.status is not None:
            value = record.objective or 0.0 if record.state == state.COMPLETE else None
            study.tell(record.number, value, state=record.state)
    mine = {record.number for record in records.all}
    for trial in study.get_trials(deepcopy=False, states=[state.RUNNING]):
        if trial.number not in mine:
            study.tell(trial.number, state=state.FAIL)
            if enqueued := trial.system_attrs.get("fixed_params"):
                study.enqueue_trial(enqueued)
