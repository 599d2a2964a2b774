"""The dispatcher between trials and worker groups, without Ray: every order of events that a cluster can produce."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dskd.config import RunConfig
from tune.trial import dispatch
from tune.trial.assignment import Assignment, Demand, Evaluation, News, Order, Training
from tune.trial.dispatch import (
    ABANDONED_SECONDS,
    IDLE_SECONDS,
    LONGEST_PAUSE,
    SETTLE_SECONDS,
    Dispatcher,
    groups_to_start,
    slots_of,
)
from tune.trial.spec import EPOCH, TrialSpec

SPEC = TrialSpec(
    config=RunConfig().to_dict(), data="", category="bolt", teacher_weights="random", cache_gb=0, num_workers=1,
    cpus_per_worker=1, gpus_per_worker=0, workers_uri="", revision="",
)  # fmt: skip
KILLED = "Worker unexpectedly exits with a connection error"
NODE_LOST = "The actor died because its node has died."
BUG = "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A dispatcher with a clock that stands still until a test moves it."""

    def __init__(self, *, is_restarted: bool = False) -> None:
        self.clock = Clock()
        self.it = Dispatcher(is_restarted=is_restarted, clock=self.clock)

    async def taken(self, slot: str = "a", generation: float = 1.0) -> Any:
        """What a group gets that asks."""
        order: Order = await self.it.ask(slot, generation)
        return order.assignment

    async def tell(self, assignment: Any, epoch: int, slot: str = "a", generation: float = 1.0, **more: Any) -> bool:
        return await self.it.report(slot, generation, assignment, {EPOCH: epoch} | more, is_over=False)

    async def end(self, assignment: Any, epoch: int, slot: str = "a", generation: float = 1.0) -> bool:
        return await self.it.report(slot, generation, assignment, {EPOCH: epoch}, is_over=True)

    async def news(self, assignment: Any, after: int = -1) -> News:
        return await self.it.follow(assignment.key, after)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real time passes only where a test waits in vain."""
    monkeypatch.setattr(dispatch, "VERDICT_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "LIFE_SECONDS", 0.05)


def run(scene: Callable[[Bench], Coroutine[Any, Any, None]], **more: bool) -> None:
    async def play() -> None:
        await scene(Bench(**more))

    asyncio.run(play())


def training(name: str = "one", category: str = "bolt") -> Training:
    import dataclasses

    return Training(trial_id=name, spec=dataclasses.replace(SPEC, category=category))


def evaluation(name: str = "one") -> Evaluation:
    return Evaluation(trial_id=name, detector_uri="", data="", category="bolt", cache_gb=0, cpus=1, threshold=1.0)


def epochs(news: News) -> list[int]:
    return [report[EPOCH] for report in news.reports]


def test_a_trial_goes_from_its_relay_to_a_group_and_its_reports_come_back_epoch_by_epoch() -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        assert not (await bench.news(one)).is_known, "it has to be submitted"
        waiting = asyncio.ensure_future(bench.taken())
        await bench.it.submit(one)
        assert await waiting == one
        for epoch in (1, 2):
            told = asyncio.ensure_future(bench.tell(one, epoch))
            assert epochs(await bench.news(one, epoch - 1 or -1)) == [epoch]
            assert not told.done(), "the group waits for the verdict"
            asked = asyncio.ensure_future(bench.news(one, epoch))
            assert await told, "to ask for the next report is to let the group go on"
            asked.cancel()
        assert not await bench.end(one, 3)
        last = await bench.news(one, 2)
        assert epochs(last) == [3] and last.is_over and last.failure is None
        assert epochs(await bench.news(one)) == [3], "a relay that was lost as it heard the end hears it again"
        await bench.it.drop(one.key)
        assert not (await bench.news(one)).is_known

    run(scene)


def test_a_dropped_trial_frees_its_group_after_the_epoch() -> None:
    async def scene(bench: Bench) -> None:
        one, two = training("one"), training("two")
        await bench.it.submit(one)
        assert await bench.taken() == one
        told = asyncio.ensure_future(bench.tell(one, 1))
        await asyncio.sleep(0)
        await bench.it.drop(one.key)
        assert not await told
        await bench.it.submit(two)
        assert await bench.taken() == two
        await bench.it.drop(two.key)  # in the middle of an epoch
        assert not await bench.tell(two, 1), "a late verdict holds from the next epoch"
        await bench.it.submit(one)
        await bench.it.drop(one.key)
        assert await bench.taken() is None, "what is dropped while it waits is never begun"

    run(scene)


def test_a_group_without_an_answer_goes_on_and_a_trial_that_nobody_follows_is_dropped_in_the_end() -> None:
    async def scene(bench: Bench) -> None:
        one, two = training("one"), training("two")
        await bench.it.submit(one)
        await bench.taken()
        assert await bench.tell(one, 1), "the category's process may be dead for a while"
        bench.clock.now += ABANDONED_SECONDS + 1
        assert not await bench.tell(one, 2)
        await bench.it.submit(two)
        bench.clock.now += ABANDONED_SECONDS + 1
        assert await bench.taken() is None

    run(scene)


def test_a_lost_groups_trial_is_taken_by_the_next_one_and_the_lost_one_is_not_heard_any_more() -> None:
    async def scene(bench: Bench) -> None:
        one, two = training("one"), training("two")
        for each in (one, two):
            await bench.it.submit(each)
        assert await bench.taken("a") == one
        await bench.tell(one, 1)
        await bench.it.failed("a", KILLED)
        assert await bench.taken("b") == one, "before those that only wait"
        assert not await bench.tell(one, 2, "a"), "a process that was only cut off must not go on"
        assert (await bench.it.ask("a", 1.0)).must_leave
        assert await bench.taken("a", 2.0) == two, "the same group begun anew"
        assert epochs(await bench.news(one)) == [1]

    run(scene)


def test_a_group_that_ray_restarts_for_another_size_gets_its_trial_back_without_a_charge() -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        await bench.it.submit(one)
        for generation in range(1, 300):
            assert await bench.taken("a", generation) == one
        assert (await bench.news(one)).failure is None

    run(scene)


def test_an_answer_that_was_lost_is_given_again() -> None:
    async def scene(bench: Bench) -> None:
        one, two = training("one"), training("two")
        await bench.it.submit(one)
        await bench.it.submit(two)
        assert await bench.taken() == await bench.taken() == one

    run(scene)


@pytest.mark.parametrize(("text", "survived"), [(NODE_LOST, 99), (KILLED, 9), (BUG, 3)])
def test_a_trial_survives_so_many_failures_between_two_epochs(text: str, survived: int) -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        await bench.it.submit(one)
        for epoch in (1, 2):
            for attempt in range(survived):
                assert await bench.taken("a", epoch * 1000.0 + attempt) == one
                await bench.it.failed("a", text)
                assert (await bench.news(one, 5)).failure is None
            assert await bench.taken("a", epoch * 2000.0) == one
            await bench.tell(one, epoch, generation=epoch * 2000.0)  # a new epoch: the account begins anew
        for attempt in range(survived + 1):
            assert await bench.taken("a", 9000.0 + attempt) == one
            await bench.it.failed("a", text)
        failure = (await bench.news(one, 5)).failure
        assert failure is not None and failure.is_own is (text == KILLED), failure
        assert await bench.taken("a", 1e6) is None, "it is not tried again"

    run(scene)


def test_a_failure_that_would_come_back_anywhere_ends_the_trial_at_once() -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        await bench.it.submit(one)
        await bench.taken()
        await bench.it.failed("a", BUG, reason="out of memory: GPU full")
        failure = (await bench.news(one)).failure
        assert failure is not None and failure == ("out of memory: GPU full", True)

    run(scene)


def test_groups_that_die_before_they_ask_are_reported_instead_of_started_for_ever() -> None:
    async def scene(bench: Bench) -> None:
        one, missing = training(), "ModuleNotFoundError: No module named 'timm'"
        await bench.it.submit(one)
        found = asyncio.ensure_future(bench.it.fault())
        for number in range(50):  # nodes that are lost are no fault of the program
            await bench.it.failed(f"spot-{number}", NODE_LOST)
            await bench.it.gone(f"spot-{number}")
        assert await bench.taken("sound") == one
        for number in range(9):  # while another works, it is only one node
            await bench.it.failed(f"{number}", missing)
            await bench.it.gone(f"{number}")
        await bench.it.failed("sound", NODE_LOST)
        await bench.it.gone("sound")
        await bench.taken("sound too")
        await bench.it.gone("sound too")
        for number in range(4):
            await asyncio.sleep(0)
            bench.clock.now += LONGEST_PAUSE
            assert not found.done() and (await bench.it.demand(-1)).num_waiting == 1
            await bench.it.failed(f"{number}", missing)
            await bench.it.gone(f"{number}")
            assert (await bench.it.demand(-1)).num_waiting == 0, "the next one is not started at once"
        assert await asyncio.wait_for(found, 1) == "ModuleNotFoundError: No module named 'timm'"
        bench.clock.now += LONGEST_PAUSE
        assert (await bench.it.demand(-1)).num_waiting == 0, "no other group is started"

    run(scene)


def test_a_restarted_dispatcher_listens_first_and_starts_nothing_twice() -> None:
    async def scene(bench: Bench) -> None:
        one, two = training("one"), training("two")
        await bench.it.submit(one)  # its relay asks before its group gives a sign of life
        idle = asyncio.ensure_future(bench.taken("b"))
        await bench.it.alive("a", 1.0, one)
        assert await idle is None, "the other group must not take it"
        bench.clock.now += SETTLE_SECONDS + 1
        await bench.it.submit(two)
        assert await bench.taken("b") == two
        told = asyncio.ensure_future(bench.tell(one, 4, "a"))
        assert epochs(await bench.news(one)) == [4]
        asked = asyncio.ensure_future(bench.news(one, 4))
        assert await told
        asked.cancel()

    run(scene, is_restarted=True)


def test_a_sign_of_life_that_comes_late_does_not_bring_back_what_has_ended() -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        await bench.it.submit(one)
        await bench.taken()
        await bench.end(one, 3)
        await bench.news(one)
        await bench.it.drop(one.key)
        await bench.it.alive("a", 1.0, one)
        assert not (await bench.news(one)).is_known

    run(scene)


def test_a_report_is_believed_by_a_dispatcher_that_knows_nothing() -> None:
    async def scene(bench: Bench) -> None:
        one = training()
        assert await bench.tell(one, 7)
        assert epochs(await bench.news(one)) == [7]
        assert (await bench.it.demand(-1)).num_waiting == 0

    run(scene)


def test_evaluations_come_first_and_a_group_stays_with_its_category() -> None:
    async def scene(bench: Bench) -> None:
        first = training("0", "screw")
        await bench.it.submit(first)
        assert await bench.taken() == first
        await bench.end(first, 1)
        others: list[Assignment] = [
            training("1", "bolt"),
            training("2", "screw"),
            training("3", "bolt"),
            evaluation("4"),
        ]
        for each in others:
            await bench.it.submit(each)
        order = []
        for _ in others:
            each = await bench.taken()
            order.append(each.trial_id)
            await bench.end(each, 1)
        assert order == ["4", "1", "3", "2"], "the evaluation was of a bolt, whose images it holds"

    run(scene)


def test_a_category_that_begins_anew_drops_what_it_does_not_know() -> None:
    async def scene(bench: Bench) -> None:
        kept, lost, other = training("kept"), training("lost"), training("other", "screw")
        for each in (kept, lost, other):
            await bench.it.submit(each)
        await bench.it.keep_only("bolt", [kept.key])
        assert [await bench.taken(slot) for slot in "abc"] == [kept, other, None]

    run(scene)


def test_an_idle_group_leaves_after_a_while_and_all_leave_at_the_end() -> None:
    async def scene(bench: Bench) -> None:
        assert not (await bench.it.ask("a", 1.0)).must_leave
        bench.clock.now += IDLE_SECONDS
        assert (await bench.it.ask("a", 1.0)).must_leave
        waiting = asyncio.ensure_future(bench.it.ask("b", 1.0))
        await asyncio.sleep(0)
        await bench.it.close()
        assert (await waiting).must_leave and (await bench.it.ask("c", 1.0)).must_leave
        assert await bench.it.fault() == "", "nobody waits for what cannot come"

    run(scene)


def test_groups_are_started_for_what_waits_and_no_more_than_there_is_room_for() -> None:
    def needed(waiting: int, groups: str, *, seen: str = "", idle: str = "", limit: int = 3) -> int:
        return groups_to_start(Demand(0, waiting, frozenset(seen), frozenset(idle)), list(groups), limit)

    assert needed(0, "") == 0
    assert needed(2, "") == 2 and needed(5, "") == 3, "up to the limit"
    assert needed(1, "a") == 0, "one that still starts will take it"
    assert needed(1, "a", seen="a") == 1, "one that works will not"
    assert needed(1, "a", seen="a", idle="a") == 0
    assert needed(2, "ab", seen="ab", idle="a") == 1
    assert needed(2, "abc", seen="abc") == 0
    assert needed(1, "abc", seen="abc", limit=2) == 0, "a cluster that shrank"


def test_a_group_that_trials_share_counts_for_as_many() -> None:
    def needed(waiting: int, groups: str, *, seen: str = "", idle: str = "", limit: int = 3) -> int:
        demand = Demand(0, waiting, frozenset(seen.split()), frozenset(idle.split()))
        return groups_to_start(demand, list(groups), limit, 2)

    assert slots_of("a", 2) == ["a.1", "a.2"] and slots_of("a", 1) == ["a"]
    assert needed(3, "") == 2 and needed(9, "") == 3
    assert needed(2, "a") == 0 and needed(3, "a") == 1
    assert needed(1, "a", seen="a.1 a.2", idle="a.2") == 0
    assert needed(2, "a", seen="a.1 a.2", idle="a.2") == 1
    assert needed(9, "ab", seen="a.1 a.2 b.1 b.2", limit=2) == 0


def test_processes_that_trials_share_are_filled_evenly_and_one_that_retires_is_not_counted_on() -> None:
    async def scene(bench: Bench) -> None:
        asking = {name: asyncio.ensure_future(bench.taken(name)) for name in ("a.1", "a.2", "b.1", "b.2")}
        await asyncio.sleep(0)
        one, two, three = training("one"), training("two"), training("three")
        await bench.it.submit(one)
        await bench.it.submit(two)
        assert await asking["a.1"] == one and await asking["b.1"] == two
        await bench.it.retire("a.2")
        assert await asking["a.2"] is None
        assert (await bench.it.demand(-1)).idle == {"b.2"}
        await bench.it.submit(three)
        assert await asking["b.2"] == three
        assert (await bench.it.demand(-1))[2:] == (frozenset(asking), frozenset())

    run(scene)


@pytest.mark.parametrize(("text", "survived"), [(KILLED, 9), (BUG, 3)])
def test_a_process_that_is_lost_puts_all_its_trials_back_and_blames_none_for_the_memory(
    text: str, survived: int
) -> None:
    async def scene(bench: Bench) -> None:
        trials, slots = [training("one"), training("two")], ["a.1", "a.2", "a.3"]
        for each in trials:
            await bench.it.submit(each)
        for number in range(survived + 1):
            taken = [await bench.taken(slot, number) for slot in slots[:2]]
            assert sorted(each.trial_id for each in taken) == ["one", "two"]
            await bench.it.lost(slots, text)
        found = [(await bench.news(each)).failure for each in trials]
        for failure in found:
            assert failure is not None and not failure.is_own
            assert "2 trials shared the process: lower --trials-per-gpu" in failure.reason

    run(scene)


def test_a_process_that_trials_would_share_and_that_never_asks_is_charged_once() -> None:
    async def scene(bench: Bench) -> None:
        for number in range(4):
            assert not bench.it._fault
            await bench.it.lost([f"{number}.1", f"{number}.2"], BUG)
        assert await bench.it.fault() == BUG

    run(scene)


def test_the_demand_is_told_as_soon_as_it_changes() -> None:
    async def scene(bench: Bench) -> None:
        version = (await bench.it.demand(-1)).version
        waiting = asyncio.ensure_future(bench.it.demand(version))
        await asyncio.sleep(0)
        await bench.it.submit(training())
        found = await waiting
        assert found.num_waiting == 1 and found.version > version
        await bench.taken()
        assert (await bench.it.demand(found.version))[1:] == (0, frozenset("a"), frozenset())
        await bench.it.gone("a")
        assert (await bench.it.demand(-1))[1:] == (1, frozenset(), frozenset())

    run(scene)


def test_a_stop_lets_nothing_begin_or_go_on_and_waits_for_what_is_being_stored() -> None:
    async def scene(bench: Bench) -> None:
        one, two, three = training("one"), training("two"), training("three")
        for each in (one, two, three):
            await bench.it.submit(each)
        assert [await bench.taken("a"), await bench.taken("b")] == [one, two]
        between = asyncio.ensure_future(bench.tell(one, 1, "a"))  # waits to hear that it goes on
        living = asyncio.ensure_future(bench.it.alive("b", 1.0, two))
        await asyncio.sleep(0)
        stopped = asyncio.ensure_future(bench.it.stop(600))
        assert not await between, "no new epoch begins"
        assert await asyncio.wait_for(living, 1), "a group in the middle of one hears of it at once"
        assert not stopped.done(), "both groups are still storing"
        assert (await bench.it.ask("a", 1.0)).must_leave
        await bench.it.saved("b")
        assert await asyncio.wait_for(stopped, 1) == 0
        assert not await bench.tell(two, 1, "b") and (await bench.it.ask("b", 1.0)).must_leave
        assert (await bench.it.ask("c", 1.0)).must_leave and (await bench.it.demand(-1)).num_waiting == 0
        assert all([(await bench.news(each)).is_known for each in (one, two, three)]), "nothing is forgotten"

    run(scene)


def test_a_stop_ends_although_a_group_does_not_answer() -> None:
    async def scene(bench: Bench) -> None:
        await bench.it.submit(training())
        await bench.taken()
        assert await bench.it.stop(0.0) == 1

    run(scene)
