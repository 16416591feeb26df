"""Sessions, fed by hand: what they judge, when, and what becomes of the latents. No diffusers."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy

from latentguard import Latents, LatentSpace, Scorer
from latentguard.encoders import Features
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.guard import Budget, Session, StepRecord, StepResult, session

OWN_SCALING = dataclasses.replace(LatentSpace.get("sd1"), scale=0.5)
STEER = "steer: {iterations: 3}"


def scorer(*args: Any, encoder: Any = None, **options: Any) -> Scorer:
    return Scorer(policy(*args, **options), encoder or LinearEncoder("sd1", 4))


def batch(count: int = 3, seed: int = 0) -> Latents:
    tensor = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Latents(tensor, "sd1", scaled=True)


def probabilities(latents: Latents) -> list[float]:
    return [v.concepts[0].probability for v in scorer().verdicts(latents)]


def threshold_between(latents: Latents) -> tuple[float, list[int]]:
    """A threshold that just one image of the batch reaches, and which one that is."""
    found = probabilities(latents)
    highest, second = sorted(found, reverse=True)[:2]
    return (highest + second) / 2, [found.index(highest)]


class Broken(LinearEncoder):
    """Raises what it is told to, from the given call on."""

    def __init__(self, error: BaseException, at: int = 0) -> None:
        super().__init__("sd1", 4)
        self.error, self.at = error, at

    def features(self, *args: Any, **options: Any) -> Features:
        found = super().features(*args, **options)
        if self.calls > self.at:
            raise self.error
        return found


# -- results -----------------------------------------------------------------------------------


def test_a_step_that_finds_nothing_gives_the_very_latents_back() -> None:
    guard, latents = Session(scorer()), batch()
    result = guard.step(latents, noise_level=3.0)
    assert isinstance(result, StepResult)
    assert result.latents is latents
    assert [verdict.decision for verdict in result.verdicts] == ["allow"] * 3
    assert [verdict.noise_level for verdict in result.verdicts] == [3.0] * 3
    assert result.stop is False
    assert not guard.finished
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.stop = True  # type: ignore[misc]
    assert guard.step(latents, noise_level=0.0, final=True).latents is latents
    assert guard.finished
    assert not guard.stopped


def test_blocked_rows_are_zero_and_the_others_keep_their_bits() -> None:
    latents = batch(4)
    limit, (worst,) = threshold_between(latents)
    given = latents.tensor.clone()
    guard = Session(scorer(limit))
    result = guard.step(latents, noise_level=1.0)
    assert torch.equal(latents.tensor, given)  # the caller's tensor is left alone
    assert not result.latents.tensor[worst].any()
    others = [i for i in range(4) if i != worst]
    assert torch.equal(result.latents.tensor[others], given[others])
    assert guard.blocked == (worst,)
    assert not result.stop
    first = result.verdicts[worst]
    assert first.decision == "block"
    assert "concept 'guns' matched 'revolver' with probability" in first.reason
    # It stays blocked, by the verdict that blocked it, whatever it looks like later.
    again = guard.step(batch(4, seed=1), noise_level=0.5)
    assert again.verdicts[worst] is first
    assert not again.latents.tensor[worst].any()
    assert guard.history[1].verdicts[worst] is None
    assert guard.history[1].actions[worst] == "already blocked"


def test_a_session_with_nothing_left_asks_to_stop_and_judges_no_more() -> None:
    encoder = LinearEncoder("sd1", 4)
    guard = Session(scorer(ALWAYS, encoder=encoder))
    assert guard.step(batch(), noise_level=2.0).stop
    calls = encoder.calls
    for final in (False, True):
        result = guard.step(batch(), noise_level=0.0, final=final)
        assert result.stop
        assert not result.latents.tensor.any()
    assert encoder.calls == calls
    assert [verdict.decision for verdict in guard.verdicts] == ["block"] * 3
    assert guard.finished


def test_packed_latents_come_back_packed() -> None:
    tensor = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    latents = Latents(tensor, "flux1", True, "packed", 4, 8)
    for action in ("block", "steer"):
        guard = Session(scorer(ALWAYS, action, encoder=LinearEncoder("flux1", 16)))
        found = guard.step(latents, latents, noise_level=1.0, alpha=0.5).latents
        assert (found.layout, found.height, found.width) == ("packed", 4, 8)
        assert found.tensor.shape == tensor.shape
        assert found.tensor.any() == (action == "steer")
        assert not torch.equal(found.tensor, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_keep_their_dtype(dtype: torch.dtype) -> None:
    for action in ("block", "steer", "observe"):
        guard = Session(scorer(ALWAYS, action))
        found = guard.step(batch().to(dtype), noise_level=1.0).latents.tensor
        assert found.dtype == dtype
        assert found.isfinite().all()


# -- when --------------------------------------------------------------------------------------


def test_every_nth_step_and_always_the_last() -> None:
    encoder = LinearEncoder("sd1", 4)
    guard = Session(scorer(extra="schedule: {every: 3}", encoder=encoder))
    given = [guard.step(batch(), noise_level=8.0 - i, final=i == 7) for i in range(8)]
    assert [len(result.verdicts) for result in given] == [3, 0, 0, 3, 0, 0, 3, 3]
    assert [record.step for record in guard.history] == [0, 3, 6, 7]
    assert encoder.calls == 4
    assert guard.history[-1].final


def test_the_schedules_noise_range_goes_by_the_level_that_x0_was_predicted_from() -> None:
    guard = Session(scorer(ALWAYS, extra="schedule: {noise: [0.5, 2]}"))
    latents = batch()
    assert guard.step(latents, latents, noise_level=1.0, x0_noise_level=4.0).verdicts == ()
    assert guard.step(latents, noise_level=0.4).verdicts == ()
    assert not guard.blocked
    result = guard.step(latents, latents, noise_level=0.3, x0_noise_level=2.0)
    assert [verdict.noise_level for verdict in result.verdicts] == [2.0] * 3
    assert result.stop


def test_a_concepts_window_says_where_it_counts_and_the_end_counts_always() -> None:
    guard = Session(scorer(ALWAYS, concept="noise_window: [0.5, 2]"))
    for level in (math.inf, 4.0, 0.4):
        (verdict, *_) = guard.step(batch(), noise_level=level).verdicts
        assert verdict.decision == "allow"
        assert not verdict.concepts[0].judged
    assert guard.step(batch(), noise_level=0.1, final=True).stop


def test_the_final_latents_themselves_are_judged_not_their_estimate() -> None:
    latents, other = batch(), batch(seed=5)
    guard = Session(scorer())
    guard.step(latents, other, noise_level=1.0)
    guard.step(latents, other, noise_level=0.0, final=True)
    first, last = guard.history
    assert (first.estimate_source, last.estimate_source) == ("x0", "latents")
    for record, judged in ((first, other), (last, latents)):
        scores = [v.concepts[0].probability for v in record.verdicts if v is not None]
        assert scores == probabilities(judged)


def test_an_image_that_was_never_judged_is_not_safe() -> None:
    guard = Session(scorer(extra="schedule: {noise: [0, 1]}"))
    guard.step(batch(), noise_level=5.0)
    assert [verdict.decision for verdict in guard.verdicts] == ["block"] * 3
    assert "the final latents were never scored" in guard.verdicts[0].reason
    assert not guard.finished


@pytest.mark.parametrize("decision", ["block", "review", "allow"])
def test_an_image_whose_end_was_never_judged_is_not_safe(decision: str) -> None:
    latents = batch()
    limit, (worst,) = threshold_between(latents)
    guard = Session(scorer(limit, extra=f"on_error: {decision}"))
    result = guard.step(latents, noise_level=0.03)
    assert [verdict.decision for verdict in result.verdicts].count("allow") == 2
    for i, verdict in enumerate(guard.verdicts):
        if i == worst:
            assert "matched" in verdict.reason
        else:
            assert verdict.decision == decision
            assert verdict.error == "the final latents were never scored"
    assert guard.to_dict()["verdicts"] == [verdict.to_dict() for verdict in guard.verdicts]
    guard.step(latents, noise_level=0.03, final=True)
    assert [verdict.error for verdict in guard.verdicts] == [None] * 3


def test_a_loop_that_goes_on_after_its_end_is_not_finished() -> None:
    guard = Session(scorer())
    guard.step(batch(), noise_level=0.0, final=True)
    assert [verdict.decision for verdict in guard.verdicts] == ["allow"] * 3
    guard.step(batch(), noise_level=0.0)
    assert not guard.finished
    assert [verdict.decision for verdict in guard.verdicts] == ["block"] * 3


# -- deferral ----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["observe", "review"])
def test_verdicts_that_change_nothing_wait_for_the_end(action: str) -> None:
    recorded: list[StepRecord] = []
    limit, (worst,) = threshold_between(batch())
    guard = Session(scorer(limit, action), on_record=lambda _, record: recorded.append(record))
    for level in (4.0, 2.0):
        result = guard.step(batch(), noise_level=level)
        assert result.verdicts == ()
        assert not recorded
    result = guard.step(batch(), noise_level=0.0, final=True)
    assert [record.noise_level for record in recorded] == [4.0, 2.0, 0.0]
    assert [record.step for record in recorded] == [0, 1, 2]
    decisions = ["allow"] * 3
    if action == "review":
        decisions[worst] = "review"
    for record in recorded:
        assert [v.decision for v in record.verdicts if v is not None] == decisions
        assert [len(v.matched) for v in record.verdicts if v] == [int(i == worst) for i in range(3)]
    assert [verdict.decision for verdict in result.verdicts] == decisions


def test_reading_the_history_makes_the_verdicts_at_once() -> None:
    guard = Session(scorer(ALWAYS, "review"))
    guard.step(batch(), noise_level=4.0)
    assert [record.step for record in guard.history] == [0]
    guard.step(batch(), noise_level=2.0)
    assert guard.verdicts[0].error == "the final latents were never scored"
    assert [record.noise_level for record in guard.history] == [4.0, 2.0]
    guard.step(batch(), noise_level=0.0, final=True)
    assert [record.step for record in guard.history] == [0, 1, 2]
    assert [verdict.decision for verdict in guard.verdicts] == ["review"] * 3


def test_deferred_scores_are_those_of_a_session_that_does_not_defer() -> None:
    found = []
    for action in ("observe", "block"):
        guard = Session(scorer(NEVER, action))
        for step, level in enumerate((4.0, 1.0, 0.0)):
            guard.step(batch(seed=step), noise_level=level, final=step == 2)
        found.append(
            [[v.concepts[0].margin for v in r.verdicts if v is not None] for r in guard.history]
        )
    assert found[0] == found[1]


def test_what_fails_while_verdicts_wait_is_not_undone_by_them() -> None:
    guard = Session(scorer(NEVER, "observe", encoder=Broken(RuntimeError("boom"), at=1)))
    guard.step(batch(), noise_level=4.0)
    assert guard.step(batch(), noise_level=2.0).stop
    assert [record.step for record in guard.history] == [0, 1]
    assert [verdict.decision for verdict in guard.verdicts] == ["block"] * 3
    other = Session(scorer(NEVER, "observe"))
    other.step(batch(), noise_level=4.0)
    assert other.fail("the loop broke")
    assert [record.step for record in other.history] == [0, 1]
    assert [verdict.error for verdict in other.verdicts] == ["the loop broke"] * 3


def test_a_nan_while_verdicts_wait_blocks_at_the_end() -> None:
    guard, broken = Session(scorer(NEVER, "observe")), batch()
    broken.tensor[1] = math.nan
    guard.step(broken, noise_level=4.0)
    guard.step(batch(), noise_level=2.0)
    result = guard.step(batch(), noise_level=0.0, final=True)
    assert guard.blocked == (1,)
    assert [verdict.decision for verdict in result.verdicts] == ["allow", "block", "allow"]
    assert "not finite" in result.verdicts[1].reason
    assert not result.latents.tensor[1].any()
    assert [record.actions[1] for record in guard.history] == ["blocked"] + ["already blocked"] * 2


# -- steering ----------------------------------------------------------------------------------


def test_only_the_flagged_rows_are_steered() -> None:
    latents = batch(4)
    limit, (worst,) = threshold_between(latents)
    guard = Session(scorer(limit, "steer", concept=STEER))
    result = guard.step(latents, latents, noise_level=2.0)
    others = [i for i in range(4) if i != worst]
    assert torch.equal(result.latents.tensor[others], latents.tensor[others])
    assert not torch.equal(result.latents.tensor[worst], latents.tensor[worst])
    norms = [x.tensor[worst].norm() for x in (result.latents, latents)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    (record,) = guard.history
    assert [i for i, action in enumerate(record.actions) if action == "steered"] == [worst]
    one = record.steering[worst]
    assert one is not None
    assert one.concept == "guns"
    assert 1 <= one.iterations <= 3
    assert one.after < one.before
    assert [record.steering[i] for i in others] == [None] * 3
    assert result.verdicts[worst].decision == "steer"


def test_a_match_of_steer_blocks_at_the_end() -> None:
    guard = Session(scorer(ALWAYS, "steer"))
    assert not guard.step(batch(), noise_level=1.0).stop
    result = guard.step(batch(), noise_level=0.0, final=True)
    assert result.stop
    assert all(v.reason.endswith("and it is too late to steer") for v in result.verdicts)


def test_alpha_scales_how_far_the_latents_follow_their_estimate() -> None:
    """moved = s (given + alpha d), s such that the norm stays; d does not depend on alpha."""
    given, x0 = batch(1), batch(1, seed=3)
    moved = {}
    for alpha in (0.0, 0.25, 1.0):
        guard = Session(scorer(ALWAYS, "steer", concept=STEER))
        result = guard.step(given, x0, noise_level=3.0, alpha=alpha)
        moved[alpha] = result.latents.tensor.double().flatten()
    g = given.tensor.double().flatten()
    torch.testing.assert_close(moved[0.0], g, rtol=1e-5, atol=1e-6)
    basis = torch.stack([moved[1.0], g], dim=1)
    solution = torch.linalg.lstsq(basis, moved[0.25][:, None]).solution[:, 0]
    torch.testing.assert_close(basis @ solution, moved[0.25], rtol=0, atol=1e-5)
    quarter = float(solution[1]) / 0.75  # the scale of the quarter's result
    whole = 0.25 * quarter / float(solution[0])
    d = moved[1.0] / whole - g
    assert float(d.norm()) > 0.1
    assert float((g + d).norm()) * whole == pytest.approx(float(g.norm()), rel=1e-3)
    assert float((g + 0.25 * d).norm()) * quarter == pytest.approx(float(g.norm()), rel=1e-3)


def test_steering_leaves_no_gradient_behind() -> None:
    guard = Session(scorer(ALWAYS, "steer"))
    found = guard.step(batch(), noise_level=1.0).latents.tensor
    assert not found.requires_grad
    with torch.inference_mode():
        assert guard.step(batch(), noise_level=0.5).latents.tensor.isfinite().all()
    assert [set(record.actions) for record in guard.history] == [{"steered"}] * 2


# -- limits ------------------------------------------------------------------------------------


def test_after_the_timeout_a_step_fails() -> None:
    guard = Session(scorer(), budget=Budget(timeout=0.0))
    guard.begin(3)
    assert guard.step(batch(), noise_level=1.0).stop
    assert "the session's timeout of 0 s has passed" in guard.verdicts[0].reason
    patient = Session(scorer(), budget=Budget(timeout=3600.0))
    patient.begin(3)
    assert not patient.step(batch(), noise_level=1.0).stop


def test_once_the_budget_is_spent_only_the_end_is_scored() -> None:
    encoder = LinearEncoder("sd1", 4)
    guard = Session(scorer(encoder=encoder), budget=Budget(scoring=0.0))
    assert [guard.step(batch(), noise_level=5.0 - i).verdicts for i in range(5)] == [()] * 5
    assert len(guard.step(batch(), noise_level=0.0, final=True).verdicts) == 3
    assert encoder.calls == 1
    spent = Session(scorer(encoder=encoder), budget=Budget(scoring=1e-9))
    assert [len(spent.step(batch(), noise_level=2.0).verdicts) for _ in range(3)] == [3, 0, 0]


def test_a_loop_without_end_fails() -> None:
    guard = Session(scorer(), budget=Budget(steps=3))
    assert [guard.step(batch(), noise_level=1.0).stop for _ in range(4)] == [False] * 3 + [True]
    assert "more than 3 steps in one session" in guard.verdicts[0].reason


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"timeout": math.nan}, "timeout must be at or above 0, got nan"),
        ({"timeout": -1.0}, "timeout must be at or above 0, got -1"),
        ({"scoring": math.nan}, "scoring must be at or above 0, got nan"),
        ({"timeout": "5"}, "timeout must be a number of seconds or None, got '5'"),
        ({"scoring": True}, "scoring must be a number of seconds or None, got True"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, r"steps must be a whole number of at least 1, got 2\.5"),
        ({"steps": None}, "steps must be a whole number of at least 1, got None"),
    ],
)
def test_budgets_that_would_never_hold_are_refused(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("final", [False, True])
def test_what_is_not_finite_is_blocked_alone(value: float, final: bool) -> None:
    latents = batch()
    latents.tensor[1, 2, 3, 4] = value
    guard = Session(scorer())
    result = guard.step(latents, noise_level=0.0, final=final)
    assert guard.blocked == (1,)
    assert not result.latents.tensor[1].any()
    for i in (0, 2):
        assert torch.equal(result.latents.tensor[i], latents.tensor[i])
        assert result.verdicts[i].decision == "allow"
    assert "is not finite" in (result.verdicts[1].error or "")


def test_an_estimate_that_is_not_finite_blocks() -> None:
    x0 = batch()
    x0.tensor[2] = math.nan
    guard = Session(scorer(ALWAYS, "steer"))
    result = guard.step(batch(), x0, noise_level=1.0)
    assert guard.blocked == (2,)
    assert result.latents.tensor.isfinite().all()


@pytest.mark.parametrize("decision", ["block", "review", "allow"])
def test_on_error_decides(decision: str) -> None:
    encoder = Broken(RuntimeError("out of memory"))
    guard = Session(scorer(extra=f"on_error: {decision}", encoder=encoder))
    latents = batch()
    result = guard.step(latents, noise_level=1.0)
    assert [verdict.decision for verdict in result.verdicts] == [decision] * 3
    assert result.verdicts[0].error == "RuntimeError: out of memory"
    assert result.stop == (decision == "block")
    assert result.latents.tensor.any() == (decision != "block")
    if decision != "block":
        assert result.latents is latents


@pytest.mark.parametrize("decision", ["review", "allow"])
@pytest.mark.parametrize("final", [False, True])
def test_a_match_stands_where_something_else_goes_wrong_after_it(
    decision: str, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = batch()
    limit, (worst,) = threshold_between(latents)
    guard = Session(scorer(limit, extra=f"on_error: {decision}"))

    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(guard, "_hold" if final else "_steer", broken)
    result = guard.step(latents, noise_level=0.0 if final else 1.0, final=final)
    expected = ["block" if i == worst else decision for i in range(3)]
    assert [verdict.decision for verdict in result.verdicts] == expected
    assert [bool(one.any()) for one in result.latents.tensor] == [i != worst for i in range(3)]


@pytest.mark.parametrize("given", [torch.zeros(1, 4, 8, 8), None, [0.0]])
def test_latents_that_do_not_say_their_space_are_refused(given: Any) -> None:
    guard = Session(scorer())
    with pytest.raises(LatentsError, match=r"latents must say of which space they are: give Late"):
        guard.step(given, noise_level=1.0)
    for call in (guard.scorer.verdicts, guard.scorer.score):
        with pytest.raises(LatentsError, match="must say of which space they are"):
            call(given)
    if given is not None:
        with pytest.raises(LatentsError, match="x0 must say of which space they are"):
            guard.step(batch(), given, noise_level=1.0)
    assert not guard.history


def test_noise_levels_may_be_tensors() -> None:
    guard = Session(scorer())
    sigma = torch.tensor(0.5)
    guard.step(batch(), batch(), noise_level=sigma, x0_noise_level=sigma, alpha=torch.tensor(1.0))
    assert json.loads(json.dumps(guard.to_dict()))["history"][0]["noise_level"] == 0.5
    assert guard.step(batch(), noise_level="far").stop  # type: ignore[arg-type]


def test_an_encoder_that_raises_is_logged_and_blocks(caplog: pytest.LogCaptureFixture) -> None:
    guard = Session(scorer(encoder=Broken(KeyError("weights"))), "request-7")
    with caplog.at_level(logging.INFO, "latentguard.guard"):
        assert guard.step(batch(1), noise_level=1.0, final=True).stop
    assert guard.verdicts[0].reason == "block: this could not be judged, KeyError: 'weights'"
    messages = [record.getMessage() for record in caplog.records]
    assert "request request-7: step 0 could not be judged" in messages
    assert f"request request-7: image 0: {guard.verdicts[0].reason}" in messages
    assert caplog.records[0].exc_info is not None


def test_being_interrupted_is_no_error_of_the_guard() -> None:
    guard = Session(scorer(encoder=Broken(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        guard.step(batch(), noise_level=1.0)


@pytest.mark.parametrize("which", ["latents", "x0"])
def test_a_batch_of_another_size_is_zeroed(which: str) -> None:
    guard = Session(scorer())
    guard.step(batch(3), noise_level=2.0)
    latents, x0 = (batch(2), batch(3)) if which == "latents" else (batch(3), batch(2))
    result = guard.step(latents, x0, noise_level=1.0)
    assert result.stop
    assert result.latents.tensor.shape == latents.tensor.shape
    assert not result.latents.tensor.any()
    assert "this session began with 3 images" in guard.verdicts[0].reason
    assert "use one session per request" in guard.verdicts[0].reason


@pytest.mark.parametrize("action", ["block", "steer", "observe"])
@pytest.mark.parametrize(
    "x0",
    [
        Latents(torch.randn(3, 4, 8, 8), "sd1", scaled=False),
        Latents(torch.randn(3, 4, 8, 8), "sdxl", scaled=True),
        Latents(torch.randn(3, 4, 16, 8), "sd1", scaled=True),
        Latents(torch.randn(3, 4, 8, 8), OWN_SCALING, scaled=True),
    ],
    ids=["scaling", "space", "size", "a scaling of its own"],
)
def test_an_estimate_in_another_convention_blocks(action: str, x0: Latents) -> None:
    guard = Session(scorer(action=action))
    result = guard.step(batch(), x0, noise_level=1.0)
    assert result.stop
    assert not result.latents.tensor.any()
    assert "x0 must have the space, scaling and size of the latents" in guard.verdicts[0].reason


def test_a_batch_of_another_size_after_one_was_blocked() -> None:
    latents = batch(3)
    limit, _ = threshold_between(latents)
    guard = Session(scorer(limit, extra="on_error: allow"))
    guard.step(latents, noise_level=2.0)
    result = guard.step(batch(2), noise_level=1.0)
    assert not result.latents.tensor.any()  # which of them is blocked cannot be told


def test_latents_of_another_space_block() -> None:
    guard = Session(scorer())
    other = Latents(torch.zeros(2, 4, 8, 8), "sdxl", True)
    assert guard.step(other, noise_level=1.0).stop
    assert "reads sd1 latents, got sdxl" in guard.verdicts[0].reason


@pytest.mark.parametrize("level", [math.nan, -1.0])
@pytest.mark.parametrize("name", ["noise_level", "x0_noise_level"])
@pytest.mark.parametrize("action", ["block", "observe"])
def test_a_noise_level_that_is_none_blocks(level: float, name: str, action: str) -> None:
    guard = Session(scorer(action=action))
    levels: dict[str, Any] = {"noise_level": 1.0, name: level}
    assert guard.step(batch(), batch(), **levels).stop
    assert f"{name} must be at or above 0, got {level}" in guard.verdicts[0].reason


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -0.5])
def test_an_alpha_that_is_none_blocks(alpha: float) -> None:
    guard = Session(scorer(ALWAYS, "steer"))
    result = guard.step(batch(), batch(), noise_level=1.0, alpha=alpha)
    assert result.stop
    assert not result.latents.tensor.any()
    assert f"alpha must be finite and at or above 0, got {alpha}" in guard.verdicts[0].reason


def test_fail_needs_to_know_the_images() -> None:
    guard = Session(scorer())
    with pytest.raises(LatentsError, match=r"the number of images is unknown: call begin\(count"):
        guard.fail("the loop broke")
    guard.begin(2)
    assert guard.fail("the loop\nbroke", noise_level=3.0, final=True)
    assert guard.finished
    assert [verdict.error for verdict in guard.verdicts] == ["the loop broke"] * 2
    assert [verdict.noise_level for verdict in guard.verdicts] == [3.0] * 2
    assert guard.history[0].actions == ("blocked", "blocked")


def test_fail_leaves_earlier_blocks_alone_and_goes_by_on_error() -> None:
    latents = batch()
    limit, (worst,) = threshold_between(latents)
    guard = Session(scorer(limit, extra="on_error: review"))
    guard.step(latents, noise_level=1.0)
    assert not guard.fail("the loop broke")
    for i, verdict in enumerate(guard.verdicts):
        assert verdict.decision == ("block" if i == worst else "review")
        assert (verdict.error is None) == (i == worst)


def test_a_record_that_cannot_be_kept_ends_the_loop() -> None:
    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    for action in ("block", "observe"):
        guard = Session(scorer(action=action), on_record=full)
        with pytest.raises(OSError, match="no space left"):
            guard.step(batch(), noise_level=0.0, final=True)


# -- sessions among others ---------------------------------------------------------------------


def test_reset_forgets_everything() -> None:
    guard = Session(scorer(ALWAYS), "one", budget=Budget(steps=1))
    guard.step(batch(3), noise_level=1.0)
    assert guard.stopped
    guard.reset("two")
    assert guard.request_id == "two"
    assert (guard.verdicts, guard.history, guard.blocked) == ([], [], ())
    assert not guard.stopped
    assert not guard.finished
    result = guard.step(batch(5, seed=9), noise_level=1.0)
    assert len(result.verdicts) == 5
    assert guard.history[0].step == 0
    assert "matched" in guard.verdicts[0].reason  # and not that there were too many steps
    guard.reset()
    assert guard.request_id not in ("", "two")


def test_sessions_on_one_scorer_share_no_state() -> None:
    shared = scorer(ALWAYS, "steer", concept=STEER)
    first, second = Session(shared), Session(shared)
    for level in (4.0, 2.0):
        first.step(batch(), noise_level=level)
    other = second.step(batch(2, seed=1), noise_level=4.0)
    alone = Session(scorer(ALWAYS, "steer", concept=STEER)).step(batch(2, seed=1), noise_level=4.0)
    assert torch.equal(other.latents.tensor, alone.latents.tensor)
    assert len(first.history) == 2
    assert len(second.history) == 1
    assert first.request_id != second.request_id


def test_a_cascade_judges_at_every_step() -> None:
    text = "cascade: {first: nano-flux2, unsure: 2}"
    encoder = LinearEncoder("flux2", 32)
    guard = Session(Scorer(policy(0.5, "observe", extra=text), encoder))
    latents = Latents(torch.randn(2, 32, 8, 8), "flux2", True)
    assert len(guard.step(latents, noise_level=1.0).verdicts) == 2  # nothing is put off
    guard.step(latents, noise_level=0.0, final=True)
    assert encoder.calls == 2


def test_a_session_made_from_names() -> None:
    guard = session("weapons", space="flux2", request_id="mine", budget=Budget(steps=5))
    assert guard.request_id == "mine"
    assert guard.budget.steps == 5
    assert guard.identity["model"] == "nano-flux2"
    assert guard.identity["policy_sha256"] == guard.scorer.policy.sha256
    with pytest.raises(ModelError, match="space"):
        session("weapons")


def test_a_scorer_of_another_policy_is_refused() -> None:
    shared = scorer(ALWAYS)
    assert session(shared.policy, shared).scorer is shared
    with pytest.raises(PolicyError, match=r"policy 'weapons'.* the scorer has policy 'test'"):
        session("weapons", shared)


def test_sessions_work_where_diffusers_is_not_installed() -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import torch
from latentguard import Latents
from latentguard.guard import session
guard = session("weapons", space="flux2")
latents = Latents(torch.zeros(1, 32, 16, 16), "flux2", True)
print(guard.step(latents, noise_level=0.0, final=True).verdicts[0].decision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "allow\n"


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "1", None])
def test_a_session_begins_with_a_whole_number_of_images(count: Any) -> None:
    guard = Session(scorer(ALWAYS))
    with pytest.raises(LatentsError, match="a whole number of images of at least 1"):
        guard.begin(count)
    result = guard.step(batch(1), noise_level=0.0, final=True)
    assert [verdict.decision for verdict in guard.verdicts] == ["block"]
    assert not result.latents.tensor.any()
