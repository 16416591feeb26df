"""Sessions: the guard's logic for one request, in any denoising loop.

The loop passes the latents of each step to a session, and gets latents and verdicts back. A session
holds all state of its request, so sessions in different threads share only the encoder's weights.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentguard.deprecated import (
    Former,
    former_keywords,
    former_names,
    former_positions,
)
from latentguard.encoders import Encoder
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.guard.blur import Grid, coarse
from latentguard.guard.record import Action, Outcome, Steering, StepRecord, session_data
from latentguard.guard.steering import Steerer
from latentguard.judge import Verdict, failed
from latentguard.policy import Policy, load_policy
from latentguard.scorer import Scorer, Scores
from latentguard.spaces import Latents, LatentSpace, Prediction
from latentguard.spaces.prediction import clean

logger = logging.getLogger("latentguard.guard")

MAX_STEPS = 10_000
"""Number of steps after which a session takes its loop to be broken."""


@dataclass(frozen=True)
class StepResult:
    """What a session returns for one step.

    latents: the latents that the loop continues with. Steered images are changed, and blocked
        images are zero. If no image is either, this is the very tensor that was given.
    verdicts: one for each image. For a blocked image it is the verdict that blocked it. Empty if
        the schedule skips this step, or if verdicts were deferred (see `Session`).
    stop: whether every image is blocked, so that nothing more needs to be computed.
    """

    latents: Latents
    verdicts: tuple[Verdict, ...]
    stop: bool


@former_keywords(budget="scoring")
@dataclass(frozen=True)
class Budget:
    """Limits on the time and the steps of a session.

    timeout: seconds from its first step. A step after that fails, and `on_error` decides. None is
        no limit.
    scoring: seconds that may be spent on scoring before the final latents. Once they are spent,
        only the final latents are still scored. None is no limit.
    steps: number of steps; a step after that fails.

    Raises ValueError for a value that is not a number, or that no session could meet.
    """

    timeout: float | None = None
    scoring: float | None = None
    steps: int = MAX_STEPS

    budget = Former("scoring")

    def __post_init__(self) -> None:
        for name, value in (("timeout", self.timeout), ("scoring", self.scoring)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number of seconds or None, got {value!r}")
            if not value >= 0:
                raise ValueError(f"{name} must be at or above 0, got {value:g}")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")


if not TYPE_CHECKING:
    __getattr__ = former_names(__name__, {"Limits": "Budget"})


@dataclass
class _State:
    """Everything that changes during a request."""

    count: int = 0
    step: int = 0
    began: float | None = None
    spent: float = 0.0
    blocked: dict[int, Verdict] = field(default_factory=dict)
    latest: list[Verdict | None] = field(default_factory=list)
    steered: dict[int, set[str]] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    history: list[StepRecord] = field(default_factory=list)
    waiting: list[tuple[int, float, str, Scores, float]] = field(default_factory=list)
    finished: bool = False
    unrecorded: bool = False
    attempt: int = 0
    taken: set[int] = field(default_factory=set)
    previews: dict[int, Grid] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()


class Session:
    """The guard for one request.

    Args:
        scorer: the policy and the encoder.
        request_id: a name for records and logs. By default it is random.
        budget: limits on the time and the steps.
        previews: whether to keep the coarse colors of each blocked image in `previews`.
        on_record: called with each StepRecord as it is made (audit logs, metrics). An exception
            that it raises is passed on: a step that cannot be recorded does not continue.

    Some policies can neither block nor steer before the final step, because their concepts only
    observe or ask for review. Then the scores of earlier steps stay on their device, and become
    verdicts at the final step, so that no step waits for the device. Reading `history` or
    `verdicts` makes these verdicts at once.

    Blocked images come back as zeros, whatever the policy's `on_block` says. `on_block` is about
    what a pipeline returns; a loop of your own looks at `verdicts` and `stopped`.

    A session must not be used by several threads at a time. Make one for each request.
    """

    @former_keywords(limits="budget")
    def __init__(
        self,
        scorer: Scorer,
        request_id: str | None = None,
        *,
        budget: Budget | None = None,
        previews: bool = False,
        on_record: Callable[[Session, StepRecord], None] | None = None,
    ) -> None:
        if scorer.space is None:
            raise ModelError(
                "a session has to know the latent space before its first latents: give space=..., "
                "or name the model"
            )
        self.scorer = scorer
        self.request_id = request_id or uuid.uuid4().hex
        self.prompts: list[str] = []
        """The prompt of each image, for audit logs that ask for it. Nothing else reads it."""
        self.budget = budget or Budget()
        self._on_record = on_record
        self._previews = previews
        actions = {concept.action for concept in scorer.policy.concepts}
        self.scores_only = "steer" not in actions
        """Whether clean estimates are only scored, and never steered."""
        acts = bool(actions & {"block", "steer"})
        self._defers = not acts and scorer.policy.cascade is None
        self._steerer = Steerer(scorer)
        self._state = _State()

    limits = Former("budget")

    # -- the loop's side ---------------------------------------------------------------------

    def begin(self, count: int) -> None:
        """Set the number of images and start the clock. The first `step` does this too.

        Raises LatentsError if the count is not a whole number of at least 1, because without an
        image there is nothing to give a verdict on.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise LatentsError(
                f"a session must begin with a whole number of images of at least 1, got {count!r}"
            )
        if self._state.began is None:
            self._state.began, self._state.count = time.perf_counter(), count
            self._state.latest = [None] * count

    @former_keywords(how="estimate_source")
    def step(
        self,
        latents: Latents,
        x0: Latents | Prediction | None = None,
        *,
        noise_level: float,
        x0_noise_level: float | None = None,
        alpha: float = 1.0,
        final: bool = False,
        estimate_source: str | None = None,
    ) -> StepResult:
        """Judge one step and act on it.

        Args:
            latents: [B, ...], the latents of the loop after this step.
            x0: the model's prediction of the clean latents, in the convention of `latents`. If
                given, it is judged instead of `latents`. A Prediction is only computed if needed.
            noise_level: noise-to-signal ratio of `latents`; 0 is clean, inf is pure noise.
            x0_noise_level: noise-to-signal ratio of the latents from which `x0` was predicted.
                Default: `noise_level`. Thresholds and the schedule depend on it.
            alpha: the factor of the clean latents in `latents`: 1 in variance-exploding schedules,
                sqrt(alphas_cumprod) in variance-preserving ones, 1 - sigma in flow matching. A
                change of x0 is multiplied by it.
            final: whether this is the last step. Then `latents` are judged and x0 is not, every
                concept is judged, and a match with the action `steer` blocks.
            estimate_source: where x0 came from, for the record. Without x0: what `latents` are.

        If judging raises an exception, `step` does not raise it. Every image that is not blocked
        yet gets the decision of the policy's `on_error`. Raises LatentsError for latents that are
        no Latents.
        """
        began = time.perf_counter()
        _check_types(latents, x0)
        noise_level, alpha = _plain(noise_level), _plain(alpha)
        x0_noise_level = None if x0_noise_level is None else _plain(x0_noise_level)
        state = self._state
        self.begin(len(latents))
        state.finished = False  # the loop continued, whatever was judged before
        level = noise_level if final or x0 is None or x0_noise_level is None else x0_noise_level
        judged: Latents | Prediction
        if x0 is None:
            judged, source = latents, estimate_source or "latents"
        else:
            judged, source = (latents, "latents") if final else (x0, estimate_source or "x0")
        index, state.step = state.step, state.step + 1
        verdicts: list[Verdict | None] = []
        steering: list[Steering | None] = [None] * state.count
        try:
            self._check(latents, judged, began)
            _check_numbers(noise_level, x0_noise_level, alpha)
            if not final and not self._due(index, level):
                return self._result(self.blanked(latents), ())
            if self._defers and not final:
                scores = self._scores(judged, level)
                state.waiting.append((index, level, source, scores, time.perf_counter() - began))
                state.spent += time.perf_counter() - began
                return self._result(latents, ())
            self._resolve()
            verdicts = self._judge(judged, level, final)
            if final:
                verdicts = self._hold(latents, verdicts, level)
            else:
                latents, steering = self._steer(
                    latents, judged, verdicts, level, noise_level, alpha
                )
        # Fail closed: whatever went wrong, these images were not judged.
        except Exception as error:
            if state.unrecorded:
                raise
            logger.exception("request %s: step %d could not be judged", self.request_id, index)
            self._resolve()
            failures = self._failed(error, level)
            # A match that was found before something else went wrong stands.
            verdicts = [
                found if found is not None and found.decision == "block" else failure
                for found, failure in zip(verdicts or failures, failures, strict=True)
            ]
        self._preview(judged, verdicts)
        self._settle(index, level, source, final, verdicts, steering, began)
        return self._result(self.blanked(latents), self._current())

    def fail(self, error: str, noise_level: float = 0.0, *, final: bool = False) -> bool:
        """Record that something outside `step` went wrong. Returns whether every image is blocked.

        Each image that is not blocked yet gets the decision of the policy's `on_error`. Raises
        LatentsError before `begin` and the first `step`, because the number of images is unknown.
        """
        if self._state.began is None:
            raise LatentsError(f"{error}, and the number of images is unknown: call begin(count)")
        self._resolve()
        began = time.perf_counter()
        index, self._state.step = self._state.step, self._state.step + 1
        verdicts = self._failed(LatentsError(error), noise_level)
        none: list[Steering | None] = [None] * len(verdicts)
        self._settle(index, noise_level, "latents", final, verdicts, none, began)
        return self.stopped

    def blanked(self, latents: Latents) -> Latents:
        """The latents, with zeros for the blocked images."""
        blocked = self.blocked
        if not blocked:
            return latents
        tensor = latents.tensor.clone()
        if len(latents) == self._state.count:
            tensor[torch.tensor(blocked, device=tensor.device)] = 0
        else:
            tensor.zero_()  # another batch: it is unknown which of them are blocked
        return _with(latents, tensor)

    def reset(self, request_id: str | None = None) -> None:
        """Forget everything, so that the session can serve another request."""
        self.prompts = []
        self.request_id = request_id or uuid.uuid4().hex
        self._state = _State()

    # -- results -----------------------------------------------------------------------------

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each image: the one that blocked it, or the one on its final latents.

        Until the session is `finished`, an image that is not blocked counts as not judged, however
        its earlier steps were judged. Its verdict says so, and follows the policy's `on_error`. The
        verdicts at each step are in `StepResult.verdicts` and in `history`.
        """
        self._resolve()
        missing = failed("the final latents were never scored", self.scorer.rules)
        done, taken = self.finished, self._state.taken
        return [
            one
            if one is not None
            and (done or i in taken or one.error is not None or one.decision == "block")
            else missing
            for i, one in enumerate(self._state.latest)
        ]

    @property
    def history(self) -> list[StepRecord]:
        """One record for each step that was scored."""
        self._resolve()
        return list(self._state.history)

    @property
    def blocked(self) -> tuple[int, ...]:
        """Indices of the images that are blocked."""
        return tuple(sorted(self._state.blocked))

    @property
    def stopped(self) -> bool:
        """Whether every image is blocked."""
        return self._state.count > 0 and len(self._state.blocked) == self._state.count

    @property
    def finished(self) -> bool:
        """Whether nothing is left to judge: the final latents were judged, or all are blocked.

        If a loop ends before this is true, its result was never judged: see `verdicts`.
        """
        return self._state.finished or self.stopped

    @property
    def identity(self) -> dict[str, Any]:
        """What records quote: the request, and the policy and the model by name and digest."""
        policy, encoder = self.scorer.policy, self.scorer.encoder
        return {
            "request_id": self.request_id,
            "policy": policy.name,
            "policy_version": policy.version,
            "policy_sha256": policy.sha256,
            "model": encoder.name,
            "model_sha256": encoder.sha256,
            "space": encoder.space,
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole session as data that JSON can hold."""
        return session_data(self.identity, self.verdicts, self.history, self.outcomes)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each image. Unless a pipeline set something else, blocked ones are
        zero."""
        return self._state.outcomes or tuple(
            Outcome("blanked" if verdict.decision == "block" else "allowed")
            for verdict in self.verdicts
        )

    @property
    def previews(self) -> dict[int, Grid]:
        """The coarse colors of blocked images that could be judged, by image index (blur.py)."""
        return dict(self._state.previews)

    @property
    def late(self) -> bool:
        """Whether the timeout of the budget has passed."""
        began, timeout = self._state.began, self.budget.timeout
        return began is not None and timeout is not None and time.perf_counter() - began > timeout

    # -- generations that replace others -----------------------------------------------------

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Set what became of the images."""
        self._state.outcomes = tuple(outcomes)

    def continues(self, first: Session, attempt: int) -> None:
        """Make this the session of another generation of the images that `first` blocked. It keeps
        the name and the clock of `first`."""
        self.request_id, self.prompts = first.request_id, first.prompts
        state, before = self._state, first._state
        state.count, state.latest = before.count, [None] * before.count
        state.attempt, state.began, state.spent = attempt, before.began, before.spent

    def adopt(self, other: Session, rows: Sequence[int]) -> None:
        """Take some images from a session that continues this one, and all of its history."""
        state, verdicts = self._state, other.verdicts
        self._resolve()
        state.history += other.history
        state.spent = other._state.spent
        state.unrecorded = state.unrecorded or other._state.unrecorded
        for row in rows:
            state.latest[row] = verdicts[row]
            state.blocked.pop(row, None)
            state.previews.pop(row, None)
            state.taken.add(row)

    @property
    def unrecorded(self) -> bool:
        """Whether a step could not be recorded. Then no result of this session may be used."""
        return self._state.unrecorded

    # -- judging -----------------------------------------------------------------------------

    def _check(self, latents: Latents, judged: Latents | Prediction, now: float) -> None:
        state, budget = self._state, self.budget
        if len(latents) != state.count or len(judged) != state.count:
            raise LatentsError(
                f"this session began with {state.count} images, step {state.step - 1} has "
                f"{len(latents)} latents and {len(judged)} estimates: use one session per request"
            )
        read = judged.latents if isinstance(judged, Prediction) else judged
        ours, its = ((x.space.name, x.scaled, x.height, x.width) for x in (latents, read))
        if ours != its or not latents.space.is_scaled_as(read.space):
            raise LatentsError(
                f"x0 must have the space, scaling and size of the latents, {latents!r}, got "
                f"{judged!r}"
            )
        if state.step > budget.steps:
            raise LatentsError(f"more than {budget.steps} steps in one session")
        assert state.began is not None
        if budget.timeout is not None and now - state.began > budget.timeout:
            raise LatentsError(f"the session's timeout of {budget.timeout:g} s has passed")

    def _due(self, index: int, level: float) -> bool:
        seconds = self.budget.scoring
        if seconds is not None and self._state.spent >= seconds:
            return False
        return not self.stopped and self.scorer.policy.schedule.due(index, level)

    @torch.inference_mode()
    def _scores(self, judged: Latents | Prediction, level: float) -> Scores:
        return self.scorer.score(judged, level)

    def _judge(
        self, judged: Latents | Prediction, level: float, final: bool
    ) -> list[Verdict | None]:
        """Verdicts on the images that are not blocked yet, and None for the others."""
        active = [i for i in range(len(judged)) if i not in self._state.blocked]
        verdicts: list[Verdict | None] = [None] * len(judged)
        if active:
            some = judged if len(active) == len(judged) else judged.pick(active)
            with torch.inference_mode():
                found = self.scorer.verdicts(some, level, final)
            for i, verdict in zip(active, found, strict=True):
                verdicts[i] = verdict
        return verdicts

    def _failed(self, error: Exception, level: float) -> list[Verdict | None]:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        verdict = failed(f"{kind}{error}", self.scorer.rules, level)
        blocked = self._state.blocked
        return [None if i in blocked else verdict for i in range(self._state.count)]

    def _resolve(self) -> None:
        """Make the verdicts that were deferred."""
        waiting, self._state.waiting = self._state.waiting, []
        for index, level, source, scores, seconds in waiting:
            found = self.scorer.decide(scores, final=False)
            verdicts = [None if i in self._state.blocked else v for i, v in enumerate(found)]
            none: list[Steering | None] = [None] * len(verdicts)
            began = time.perf_counter() - seconds
            self._settle(index, level, source, False, verdicts, none, began)

    # -- acting ------------------------------------------------------------------------------

    def _steer(
        self,
        latents: Latents,
        judged: Latents | Prediction,
        verdicts: Sequence[Verdict | None],
        level: float,
        after: float,
        alpha: float,
    ) -> tuple[Latents, list[Steering | None]]:
        """Steer the images that are flagged or were flagged before. The others keep their bytes.

        The steerer keeps watching an image that was flagged. It leaves the image alone while its
        score is below the steerer's own limit. This limit is lower than the threshold, so that no
        image settles just below the threshold.
        """
        records: list[Steering | None] = [None] * len(latents)
        steered = self._state.steered
        for i, verdict in enumerate(verdicts):
            if verdict is not None and verdict.decision == "steer":
                matched = {score.id for score in verdict.matched if score.action == "steer"}
                steered[i] = steered.get(i, set()) | matched
                self._state.since.setdefault(i, level)
        names = self._held(verdicts)
        held = list(names)
        if not held:
            return latents, records
        moved, found = self._steerer(
            latents.pick(held),
            clean(judged.pick(held)),
            list(names.values()),
            level,
            alpha,
            after,
            [self._state.since[i] for i in held],
        )
        changed = [row for row, record in enumerate(found) if record is not None]
        for row in changed:
            records[held[row]] = found[row]
        if not changed:
            return latents, records
        device = latents.tensor.device
        tensor = latents.tensor.clone()
        rows = torch.tensor(changed, device=device)
        tensor[torch.tensor(held, device=device)[rows]] = moved[rows].to(tensor)
        return _with(latents, tensor), records

    def _hold(
        self, judged: Latents, verdicts: list[Verdict | None], level: float
    ) -> list[Verdict | None]:
        """The final verdicts, which are stricter on images that were steered: see `_steer`."""
        names = self._held(verdicts)
        if not names:
            return verdicts
        above = self._steerer.above(judged.pick(list(names)), list(names.values()), level)
        for i, sentence in zip(names, above, strict=True):
            verdict = verdicts[i]
            if sentence is not None and verdict is not None and verdict.decision != "block":
                verdicts[i] = replace(verdict, decision="block", reason=f"block: {sentence}")
        return verdicts

    def _held(self, verdicts: Sequence[Verdict | None]) -> dict[int, set[str]]:
        """The images that were steered and are not blocked, by this step or before. For each, the
        concepts that it was steered away from and that this step judges."""
        found = {}
        for i, names in self._state.steered.items():
            verdict = verdicts[i]
            if verdict is not None and verdict.decision != "block":
                judged = {score.id for score in verdict.concepts if score.judged}
                if judged & names:
                    found[i] = judged & names
        return found

    def _preview(self, judged: Latents | Prediction, verdicts: Sequence[Verdict | None]) -> None:
        """Keep the colors of images that are blocked now, except those that could not be judged."""
        rows = [i for i, v in enumerate(verdicts) if v and v.decision == "block" and not v.error]
        if not self._previews or not rows or len(judged) != len(verdicts):
            return
        try:
            grids = coarse(clean(judged.pick(rows)))
        except LatentsError:  # the space has no view
            return
        self._state.previews.update(zip(rows, grids, strict=True))

    def _settle(
        self,
        index: int,
        level: float,
        source: str,
        final: bool,
        verdicts: Sequence[Verdict | None],
        steering: Sequence[Steering | None],
        began: float,
    ) -> None:
        """Store the verdicts, and record the step."""
        state = self._state
        actions: list[Action] = []
        for i, verdict in enumerate(verdicts):
            if verdict is None:
                actions.append("already blocked")
                continue
            state.latest[i] = verdict
            if verdict.decision == "block":
                state.blocked[i] = verdict
                logger.info("request %s: image %d: %s", self.request_id, i, verdict.reason)
                actions.append("blocked")
            else:
                actions.append("none" if steering[i] is None else "steered")
        state.finished = state.finished or final
        seconds = time.perf_counter() - began
        state.spent += seconds
        record = StepRecord(
            *(index, level, source, final),
            *(tuple(verdicts), tuple(actions), tuple(steering)),
            seconds,
            state.attempt,
        )
        state.history.append(record)
        if self._on_record is not None:
            state.unrecorded = True
            self._on_record(self, record)
            state.unrecorded = False

    def _current(self) -> tuple[Verdict, ...]:
        missing = failed("not scored yet", self.scorer.rules)
        return tuple(verdict or missing for verdict in self._state.latest)

    def _result(self, latents: Latents, verdicts: tuple[Verdict, ...]) -> StepResult:
        return StepResult(latents, verdicts, self.stopped)


@former_keywords(encoder="model", limits="budget")
@former_positions(2, "request_id")
def session(
    policy: Policy | str | Path = "default",
    model: Encoder | Scorer | str | Path = "auto",
    *,
    space: LatentSpace | str | None = None,
    device: torch.device | str | None = None,
    request_id: str | None = None,
    budget: Budget | None = None,
) -> Session:
    """A new session, for loops that are not those of a diffusers pipeline.

    Args:
        policy, space, device: as for `Scorer`.
        model: an Encoder, its name or path, "auto" (with `space`), or a Scorer of this policy. A
            server makes one Scorer and passes it to the session of each request.
        request_id, budget: as for `Session`.

    Raises PolicyError if the scorer has another policy, and the errors of Scorer.
    """
    if isinstance(model, Scorer):
        asked, own = load_policy(policy), model.policy
        if asked.sha256 != own.sha256:
            raise PolicyError(
                f"policy '{asked.name}' ({asked.sha256[:12]}) was asked for, but the scorer has "
                f"policy '{own.name}' ({own.sha256[:12]})"
            )
        return Session(model, request_id, budget=budget)
    return Session(Scorer(policy, model, space=space, device=device), request_id, budget=budget)


def _check_types(latents: Latents, x0: Latents | Prediction | None) -> None:
    """Raises LatentsError."""
    for name, value in (("latents", latents), ("x0", x0)):
        fits = isinstance(value, Latents) or (
            name == "x0" and (value is None or isinstance(value, Prediction))
        )
        if not fits:
            raise LatentsError(
                f"{name} must say of which space they are: give Latents(tensor, space, scaled), "
                f"got {type(value).__name__}"
            )


def _plain(number: Any) -> float:
    """A number as a float: a scheduler's sigmas are tensors. NaN for what is none, which
    `_check_numbers` refuses."""
    try:
        return float(number)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _check_numbers(noise_level: float, x0_noise_level: float | None, alpha: float) -> None:
    for name, value in (("noise_level", noise_level), ("x0_noise_level", x0_noise_level)):
        if value is not None and not value >= 0:
            raise LatentsError(f"{name} must be at or above 0, got {value}")
    if not 0 <= alpha < math.inf:
        raise LatentsError(f"alpha must be finite and at or above 0, got {alpha}")


def _with(latents: Latents, tensor: Tensor) -> Latents:
    return Latents(
        tensor, latents.space, latents.scaled, latents.layout, latents.height, latents.width
    )
