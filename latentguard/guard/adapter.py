"""LatentGuard: the guard as a diffusers callback, a thin adapter over sessions."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from diffusers.callbacks import PipelineCallback

from latentguard.denoised import check_scheduler
from latentguard.deprecated import former_keywords
from latentguard.encoders import Encoder
from latentguard.errors import GuardError, LatentsError
from latentguard.guard import output as outputs
from latentguard.guard.answers import Answers, Blocked
from latentguard.guard.attachment import check_actions
from latentguard.guard.audit import AuditLog
from latentguard.guard.blur import check_blurs
from latentguard.guard.install import install
from latentguard.guard.layout import check_readable, layout_of, space_of
from latentguard.guard.metrics import Metrics
from latentguard.guard.record import StepRecord
from latentguard.guard.requests import Place, Request, add_to_request, here, opened, request_of
from latentguard.guard.running import Marked
from latentguard.guard.sessions import Budget, Session
from latentguard.judge import PolicyId, Verdict
from latentguard.policy import Policy, load_policy
from latentguard.scorer import Scorer
from latentguard.spaces import LatentSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

logger = logging.getLogger("latentguard.guard")

install()


def _compile_modes() -> list[str]:
    """Those of this torch."""
    import torch._inductor

    return list(torch._inductor.list_mode_options())


class LatentGuard(PipelineCallback, Marked):
    """Scores a pipeline's latents while it denoises, and steers or blocks as the policy says.

        pipe.callback_on_step_end = LatentGuard(policy)

    `pipe(..., callback_on_step_end=guard)` and `MultiPipelineCallbacks` work too. Your own callback
    runs first, and the guard sees the latents last. `None` detaches. Modular pipelines are guarded
    by `into(blocks)`. One guard serves any number of pipelines and threads, and each call has a
    session of its own.

    Args:
        policy: a Policy, the name of a shipped one, or a path.
        model: an Encoder, its name or path, or "auto" for the best one of the pipeline's space.
        space: the latent space, if it cannot be found from the pipeline's VAE. A space that
            contradicts the VAE is refused.
        device: where the encoder runs; None is the device of the latents.
        on_block: for `on_block: callback`: a function that is called for each blocked image with a
            `Blocked`, or with (index, verdict, blank image) if it takes three arguments. It returns
            the replacement.
        placeholder: for `on_block: placeholder`: a PIL image, or the path of one.
        budget: the time, the scoring time and the steps of a call.
        audit: a path or AuditLog: one JSON line for each image and scored step.
        compile: a mode of torch.compile for the encoder ("default", "reduce-overhead" for CUDA
            graphs, ...), None for eager.

    After a call, `verdicts` has the verdict on each image and `history` has every scored step, for
    the thread and task that made the call. The pipeline's output carries both as
    `output.latentguard`. `request` collects them from calls in other threads and tasks.

    Raises:
        PolicyError, ModelError: policy or model cannot be used, here or when it is attached.
        ValueError: `compile` is not a mode of torch.compile.
        GuardError: when it is attached: the pipeline's latent space is unknown, or it has no step
            callback.
    """

    tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers reads it as a class attribute)

    @former_keywords(limits="budget")
    def __init__(
        self,
        policy: Policy | str | Path = "default",
        model: Encoder | str | Path = "auto",
        *,
        space: LatentSpace | str | Path | None = None,
        device: torch.device | str | None = None,
        on_block: Callable[[Blocked], Any] | Callable[[int, Verdict, Any], Any] | None = None,
        placeholder: Image | str | Path | None = None,
        budget: Budget | None = None,
        audit: AuditLog | str | Path | None = None,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if compile is not None and compile not in (modes := _compile_modes()):
            raise ValueError(f"compile must be None or one of {', '.join(modes)}, got {compile!r}")
        self._policy = load_policy(policy)
        self._answers = Answers(self.policy, on_block, placeholder)
        self._model = model
        self._space = None if space is None else LatentSpace.of(space)
        self._device = device
        self._budget = budget
        self._audit = audit if audit is None or isinstance(audit, AuditLog) else AuditLog(audit)
        self._compile = compile
        self._start()

    def _start(self) -> None:
        self._metrics = Metrics()
        self._scorers: dict[tuple[str, str], Scorer] = {}
        self._lock = threading.Lock()
        # By where the call was made; None for one that ended before anything was judged.
        self._kept: WeakKeyDictionary[Place, Session | None] = WeakKeyDictionary()
        self._called = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickled, by itself or with a pipeline, it keeps its settings and forgets its calls."""
        fresh = ("_metrics", "_scorers", "_lock", "_kept", "_called")
        return {name: value for name, value in vars(self).items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __deepcopy__(self, memo: Any) -> LatentGuard:
        """A copied pipeline is guarded by the same guard."""
        return self

    @property
    def policy(self) -> Policy:
        """The policy by which it judges. For another policy make another guard."""
        return self._policy

    @property
    def config(self) -> dict[str, Any]:
        """Policy (by name, version and digest), model and space, as a config of diffusers."""
        model = self._model if isinstance(self._model, (str, Path)) else self._model.name
        return {
            "policy": PolicyId(self.policy.name, self.policy.version, self.policy.sha256).to_dict(),
            "model": str(model),
            "space": None if self._space is None else self._space.name,
        }

    def to_json_string(self) -> str:
        """The config as JSON."""
        return json.dumps(self.config, indent=2) + "\n"

    def __repr__(self) -> str:
        policy, said = self.policy, self.config
        return (
            f"LatentGuard(policy={policy.name!r} {policy.version} ({policy.sha256[:12]}), "
            f"model={said['model']!r}, space={said['space']!r})"
        )

    def into(self, blocks: Any) -> Any:
        """A copy of a modular pipeline's blocks with this guard in them, see `guarded_blocks`.

        pipe = guard.into(blocks).init_pipeline(...)
        """
        from latentguard.guard.blocks import guarded_blocks  # where diffusers has them

        return guarded_blocks(blocks, self)

    # -- sessions ----------------------------------------------------------------------------

    def session(
        self, request_id: str | None = None, *, space: LatentSpace | str | Path | None = None
    ) -> Session:
        """A session under this guard's policy, for a loop of your own.

        `space` is needed with model "auto" unless the guard or its policy names it.
        """
        given = space if space is not None else self._space or self.policy.space
        scorer = self._scorer(None if given is None else LatentSpace.of(given), None)
        return Session(scorer, request_id, budget=self._budget, on_record=self._recorded_alone)

    def _scorer(self, space: LatentSpace | None, device: torch.device | None) -> Scorer:
        """One scorer for each space and device, made when it is first needed."""
        where = self._device if self._device is not None else device
        key = ("" if space is None else space.name, str(where))
        with self._lock:
            if key not in self._scorers:
                # Made within a call in inference mode, it could give no gradients in later ones.
                with torch.inference_mode(False):
                    scorer = Scorer(self.policy, self._model, space=space, device=where)
                if self._compile is not None:
                    scorer.compile(self._compile)
                self._scorers[key] = scorer
            return self._scorers[key]

    def _recorded(self, session: Session, record: StepRecord) -> None:
        self._metrics.record(session, record)
        if self._audit is not None:
            self._audit.write(session, record)

    def _recorded_alone(self, session: Session, record: StepRecord) -> None:
        """In a loop of the user's own, which ends with the final latents."""
        self._recorded(session, record)
        if record.final or session.stopped:
            self._metrics.ended(session)

    # -- what a guarded call asks ------------------------------------------------------------

    def _space_of(self, pipe: Any) -> LatentSpace:
        """The latent space of a pipeline. Raises GuardError where it is not known."""
        return space_of(pipe, self._space)

    def _prepare(self, pipe: Any) -> None:
        """Find out whether this guard can serve a pipeline, and load what it takes."""
        outputs.check_images(pipe)
        check_readable(pipe)
        check_scheduler(pipe.scheduler)
        space = self._space_of(pipe)
        layout_of(pipe, space)
        check_actions(pipe, self.policy)
        self._check_answers(pipe, space)
        self._scorer(space, pipe._execution_device)

    def _prepare_blocks(self, pipe: Any) -> None:
        """Find out whether this guard can serve a modular pipeline, and load what it takes.

        That its latents can be read is found out by the call (modular.py).
        """
        if getattr(pipe, "scheduler", None) is not None:
            check_scheduler(pipe.scheduler)
        space = self._space_of(pipe)
        self._check_answers(pipe, space)
        self._scorer(space, pipe._execution_device)

    def _check_answers(self, pipe: Any, space: LatentSpace) -> None:
        """Raises GuardError where `on_block` asks for what a pipeline's latents do not give."""
        if self._answers.word == "blur":
            check_blurs(space, type(pipe).__name__)

    def _session_for(self, pipe: Any, device: torch.device) -> Session:
        """The session of one call, which belongs to the request that it is made in."""
        scorer = self._scorer(self._space_of(pipe), device)
        request = request_of(self)
        name = None if request is None else request.id
        return Session(
            scorer,
            name,
            budget=self._budget,
            previews=self._answers.previews,
            on_record=self._recorded,
        )

    def _forget(self) -> None:
        """A call begins here: what the last one said is not asked for any more."""
        self._called = True
        self._remember(None)

    def _keep(self, session: Session) -> None:
        """A call has ended: its session is the one that `verdicts` and `history` tell of here."""
        self._remember(session)
        add_to_request(self, session)

    def _remember(self, session: Session | None) -> None:
        place = here()
        with self._lock:
            self._kept[place] = session

    def _ended(self, session: Session) -> None:
        """Nothing of a call is left to be judged: count its images, and say what became of them."""
        self._metrics.ended(session)
        if self._audit is not None:
            self._audit.write_outcomes(session)

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Stands where diffusers would call a callback; a guarded call never gets here."""
        raise GuardError(
            f"LatentGuard was called outside of a guarded call of {type(pipeline).__name__}: only "
            "classes derived from diffusers.DiffusionPipeline can be guarded this way; in a loop "
            "of your own use guard.session(...)"
        )

    # -- what came of it ---------------------------------------------------------------------

    def request(self, id: str | None = None) -> AbstractContextManager[Request]:
        """The verdicts of the calls of one request, in any threads and tasks.

            with guard.request(id) as record:
                output = await asyncio.to_thread(pipe, prompt)
            record.verdicts

        A call of this guard belongs to the request if it runs in this context or in a copy of it,
        which `asyncio.to_thread` and new tasks make. `id` names the request in records and audit
        lines; it is random by default.
        """
        return opened(Request(self, id))

    @property
    def last(self) -> Session | None:
        """The session of the last call that was made in this thread, task and context.

        None before the first call of this guard. Raises LatentsError if its calls were made
        elsewhere, or if the last one here ended before anything was judged.
        """
        if not self._called:
            return None
        place = here()
        with self._lock:
            known, session = place in self._kept, self._kept.get(place)
        if not known:
            raise LatentsError(
                "no call of this guard was made in this thread and task, and those of others are "
                "not told here: take output.latentguard of the call's output, or make the call "
                "within guard.request()"
            )
        if session is None:
            raise LatentsError(
                "the last call here ended before anything was judged, so there is no verdict on it"
            )
        return session

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each image of the last call here. Raises LatentsError as `last` does."""
        last = self.last
        return [] if last is None else last.verdicts

    @property
    def history(self) -> list[StepRecord]:
        """Each scored step of the last call here. Raises LatentsError as `last` does."""
        last = self.last
        return [] if last is None else last.history

    def to_json(self, path: str | Path | None = None) -> str:
        """The last call as JSON (policy and model by digest, verdicts, every scored step).

        It is also written to `path` if one is given. Raises LatentsError before the first call, and
        as `last` does.
        """
        text = json.dumps(self._told().to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """A plot of scores and thresholds over the noise level of the last call, one line for each
        image.

        It is also saved to `path` if one is given. Raises LatentsError before the first call, and
        as `last` does.
        """
        from latentguard.guard.plot import plot

        figure = plot(self._told())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _told(self) -> Session:
        last = self.last
        if last is None:
            raise LatentsError("this guard has not seen a call yet")
        return last
