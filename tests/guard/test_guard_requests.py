"""A verdict belongs to its call, wherever the call runs and wherever the verdict is read."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers.callbacks import MultiPipelineCallbacks
from guard_helpers import ALWAYS, NEVER, policy
from guard_traps import XL, blocking, guarded

from latentguard import LatentGuard
from latentguard.errors import LatentGuardError, LatentsError
from latentguard.guard import GenerationBlocked

STEPS = 2


@pytest.fixture(scope="module")
def limit() -> tuple[float, dict[str, int]]:
    """A threshold that one of two seeds reaches, and which is which."""
    pipe = small.sdxl()
    scores = {}
    for seed in range(4):
        guard = LatentGuard(policy(action="observe"), XL)
        pipe(**small.sdxl_arguments(1, STEPS, seed=seed), callback_on_step_end=guard)
        scores[seed] = max(r.verdicts[0].concepts[0].probability for r in guard.history)  # type: ignore[union-attr]
    low, high = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return (scores[low] + scores[high]) / 2, {"allow": low, "block": high}


def choosy(limit: tuple[float, dict[str, int]]) -> tuple[LatentGuard, Any]:
    """A guard, and a function from "allow" or "block" to the output of such a call.

    Each call has a copy of the pipeline with a scheduler of its own, as servers do it.
    """
    guard = LatentGuard(policy(limit[0]), XL)
    base = guarded(guard)

    def generate(what: str, **more: Any) -> Any:
        pipe = copy.copy(base)
        pipe.scheduler = copy.deepcopy(base.scheduler)
        return pipe(**small.sdxl_arguments(1, STEPS, seed=limit[1][what], **more))

    return guard, generate


def asked(guard: LatentGuard) -> str:
    """What the guard says of "the last call" where this is asked."""
    try:
        return guard.verdicts[0].decision
    except LatentsError as error:
        return str(error)


ELSEWHERE = "no call of this guard was made in this thread and task"


# -- the last call -----------------------------------------------------------------------------


def test_another_thread_is_told_nothing(limit: Any) -> None:
    guard, generate = choosy(limit)
    generate("allow")
    found: list[str] = []
    for read in ("verdicts", "history", "last", "to_json", "plot"):

        def ask(read: str = read) -> None:
            try:
                value = getattr(guard, read)
                found.append(f"told {value() if callable(value) else value}")
            except LatentsError as error:
                found.append(str(error))

        worker = threading.Thread(target=ask)
        worker.start()
        worker.join()
    assert len(found) == 5
    assert all(ELSEWHERE in one for one in found)
    assert asked(guard) == "allow"


def test_a_server_is_not_told_of_its_warm_up(limit: Any) -> None:
    """A call in the main thread, then one in a worker whose verdicts the event loop asks for."""
    guard, generate = choosy(limit)
    generate("allow")

    async def request(what: str) -> tuple[bool, str]:
        output = await asyncio.to_thread(generate, what)
        return output.images.any(), asked(guard)

    shown, told = asyncio.run(request("block"))
    assert not shown
    assert ELSEWHERE in told
    assert asked(guard) == "allow"


def test_requests_of_a_server_that_overlap(limit: Any) -> None:
    guard, generate = choosy(limit)

    async def request(what: str, wait: float) -> tuple[str, list[str], str, str]:
        with guard.request() as record:
            output = await asyncio.to_thread(generate, what)
        await asyncio.sleep(wait)
        return (
            output.latentguard.verdicts[0].decision,
            [verdict.decision for verdict in record.verdicts],
            record.id,
            asked(guard),
        )

    async def both() -> Any:
        return await asyncio.gather(request("block", 0.3), request("allow", 0))

    found = asyncio.run(both())
    for (attribute, record, _, told), want in zip(found, ("block", "allow"), strict=True):
        assert attribute == want
        assert record == [want]
        assert ELSEWHERE in told
    assert found[0][2] != found[1][2]


def test_calls_in_tasks_that_block_the_loop_are_told_to_their_own_task(limit: Any) -> None:
    guard, generate = choosy(limit)

    async def request(what: str) -> str:
        generate(what)
        await asyncio.sleep(0.05)
        return asked(guard)

    async def both() -> Any:
        return await asyncio.gather(request("block"), request("allow"))

    assert asyncio.run(both()) == ["block", "allow"]
    generate("allow")

    async def child() -> str:
        return await asyncio.create_task(asyncio.to_thread(asked, guard))

    assert ELSEWHERE in asyncio.run(child())


def test_a_worker_that_is_used_again_is_not_told_of_the_request_before(limit: Any) -> None:
    """In the same thread, but in a context of its own."""
    guard, generate = choosy(limit)
    generate("block")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(contextvars.copy_context().run, generate, "allow")
        assert first.result().images.any()
        second = pool.submit(contextvars.copy_context().run, asked, guard)
        assert ELSEWHERE in second.result()


def test_before_the_first_call_of_all_there_is_nothing() -> None:
    guard = blocking()
    assert (guard.verdicts, guard.history, guard.last) == ([], [], None)
    guarded(guard)
    assert guard.verdicts == []


# -- a call that fails ---------------------------------------------------------------------------

FAILURES: dict[str, dict[str, Any]] = {
    "refused by the pipeline": {"height": 63},
    "prompts twice": {"prompt": "a cat"},
    "a guard in another place": {"cross_attention_kwargs": {"guard": blocking()}},
}


@pytest.mark.parametrize("why", FAILURES)
def test_a_call_that_fails_early_leaves_no_verdict_of_the_one_before(why: str) -> None:
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(1, STEPS))
    assert asked(guard) == "allow"
    with pytest.raises((ValueError, TypeError, LatentGuardError)):
        pipe(**small.sdxl_arguments(1, STEPS), **FAILURES[why])
    assert "ended before anything was judged" in asked(guard)
    pipe(**small.sdxl_arguments(1, STEPS))
    assert asked(guard) == "allow"
    with pytest.raises(TypeError):
        pipe(*range(99))
    assert "ended before anything was judged" in asked(guard)


@pytest.mark.parametrize("what", ["scheduler", "vae"])
def test_a_call_that_the_guard_refuses_leaves_no_verdict_of_the_one_before(what: str) -> None:
    from diffusers import IPNDMScheduler

    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(1, STEPS))
    if what == "scheduler":
        pipe.scheduler = IPNDMScheduler()
    else:
        pipe.vae = small.autoencoder(4, 0.18215)
    with pytest.raises(LatentGuardError):
        pipe(**small.sdxl_arguments(1, STEPS))
    assert "ended before anything was judged" in asked(guard)


def test_a_call_that_fails_in_its_loop_replaces_the_one_before() -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("mine")

    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(1, STEPS))
    with pytest.raises(RuntimeError, match="mine"):
        pipe(**small.sdxl_arguments(1, STEPS), callback_on_step_end=fails)
    assert asked(guard) == "block"
    assert "never scored" in guard.verdicts[0].reason


def test_a_call_given_as_an_argument_that_fails_early() -> None:
    guard, pipe = LatentGuard(policy(NEVER), XL), small.sdxl()
    both = MultiPipelineCallbacks([guard])
    pipe(**small.sdxl_arguments(1, STEPS), callback_on_step_end=both)
    with pytest.raises(ValueError, match="divisible"):
        pipe(**small.sdxl_arguments(1, STEPS), callback_on_step_end=both, height=63)
    assert "ended before anything was judged" in asked(guard)


# -- the output's own record ---------------------------------------------------------------------


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("threshold", [ALWAYS, NEVER])
def test_an_output_carries_its_own_record(return_dict: bool, threshold: float) -> None:
    guard = LatentGuard(policy(threshold), XL)
    pipe = guarded(guard)
    first = pipe(**small.sdxl_arguments(2, STEPS), return_dict=return_dict)
    record = first.latentguard
    assert list(record.verdicts) == guard.verdicts
    assert list(record.history) == guard.history
    assert guard.last is not None
    assert record.request_id == guard.last.request_id
    pipe(**small.sdxl_arguments(1, STEPS))
    assert first.latentguard is record
    assert len(record.verdicts) == 2
    if return_dict:
        assert list(first.keys()) == ["images"]
        assert len(first.to_tuple()) == 1
    else:
        (images,) = first
        assert isinstance(first, tuple)
        assert len(images) == 2


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_record_is_copied_and_pickled_with_its_output(return_dict: bool) -> None:
    output = guarded(blocking())(**small.sdxl_arguments(1, STEPS), return_dict=return_dict)
    for other in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(other) is type(output)
        assert other.latentguard == output.latentguard


def test_the_record_of_two_guards_has_the_strictest_verdict() -> None:
    first, second = LatentGuard(policy(NEVER), XL), blocking()
    output = guarded(MultiPipelineCallbacks([first, second]))(**small.sdxl_arguments(2, STEPS))
    assert [verdict.decision for verdict in output.latentguard.verdicts] == ["block", "block"]
    assert len(output.latentguard.history) == len(first.history) + len(second.history)


def test_an_output_without_a_guard_carries_nothing() -> None:
    for more in ({}, {"return_dict": False}):
        output = small.sdxl()(**small.sdxl_arguments(1, STEPS, **more))
        assert not hasattr(output, "latentguard")
    blocking()
    assert type(output) is tuple


# -- requests --------------------------------------------------------------------------------------


def test_a_request_names_its_calls_everywhere(tmp_path: Any) -> None:
    guard = LatentGuard(policy(NEVER), XL, audit=tmp_path / "audit.jsonl")
    pipe = guarded(guard)
    with guard.request("mine") as record:
        pipe(**small.sdxl_arguments(2, STEPS))
        pipe(**small.sdxl_arguments(1, STEPS))
    pipe(**small.sdxl_arguments(1, STEPS))
    assert record.id == "mine"
    assert [len(call.verdicts) for call in record.calls] == [2, 1]
    assert {call.request_id for call in record.calls} == {"mine"}
    assert len(record.verdicts) == 3
    assert len(record.history) == 2 * STEPS
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert sum('"mine"' in line for line in lines) == 3 * STEPS
    assert len(lines) == 4 * STEPS


def test_a_request_without_a_call_says_so() -> None:
    guard = LatentGuard(policy(NEVER), XL)
    with guard.request("mine") as record:
        worker = threading.Thread(
            target=lambda: guarded(guard)(**small.sdxl_arguments(1, STEPS))
        )  # with an empty context: it belongs to nothing
        worker.start()
        worker.join()
    for read in ("verdicts", "history"):
        with pytest.raises(LatentsError, match="no call of this guard has ended in request 'mine'"):
            getattr(record, read)
    assert record.calls == []


def test_requests_within_requests_and_of_other_guards_are_kept_apart() -> None:
    guard, other = LatentGuard(policy(NEVER), XL), blocking()
    with guard.request() as outer, other.request() as others:
        with guard.request() as inner:
            guarded(guard)(**small.sdxl_arguments(1, STEPS))
        guarded(other)(**small.sdxl_arguments(1, STEPS))
    assert [verdict.decision for verdict in inner.verdicts] == ["allow"]
    assert [verdict.decision for verdict in others.verdicts] == ["block"]
    assert outer.calls == []


def test_a_call_that_is_blocked_by_an_exception_is_in_its_request() -> None:
    guard = LatentGuard(policy(ALWAYS, extra="on_block: raise"), XL)
    with guard.request() as record, pytest.raises(GenerationBlocked):
        guarded(guard)(**small.sdxl_arguments(1, STEPS))
    assert [verdict.decision for verdict in record.verdicts] == ["block"]


def test_a_guard_that_nobody_holds_is_freed() -> None:
    """With its scorers: places and requests hold no guard."""
    import gc
    from weakref import ref

    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    with guard.request():
        pipe(**small.sdxl_arguments(1, STEPS))
    gone = ref(guard)
    pipe.callback_on_step_end = None
    del guard
    gc.collect()
    assert gone() is None


def test_a_request_that_is_closed_in_another_context(limit: tuple[float, dict[str, int]]) -> None:
    """As servers close a generator that they opened: nothing fails, and it does take no more."""
    guard, generate = choosy(limit)

    def opened() -> Any:
        with guard.request("one") as record:
            yield record

    where, dependency = contextvars.copy_context(), opened()
    record = where.run(next, dependency)
    where.run(generate, "block")
    contextvars.copy_context().run(dependency.close)
    where.run(generate, "allow")
    assert [verdict.decision for verdict in record.verdicts] == ["block"]


def test_a_call_that_outlives_its_request_belongs_to_it(
    limit: tuple[float, dict[str, int]],
) -> None:
    guard, generate = choosy(limit)
    began, closed = threading.Event(), threading.Event()

    def wait(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        began.set()
        assert closed.wait(60)
        return values

    with ThreadPoolExecutor(1) as pool:
        with guard.request("one") as record:
            run = contextvars.copy_context().run
            future = pool.submit(run, lambda: generate("allow", callback_on_step_end=wait))
            assert began.wait(60)
        closed.set()
        future.result()
    assert record.calls[0].request_id == "one"
