"""The judges of a scan: for each latent space that occurs, a policy bound to a model.

The engine only uses `Judges.of`. torch and the ONNX runtime differ only in how a judge is found.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentguard.errors import ModelError, PolicyError
from latentguard.judge import BoundRules, Judged, Rules
from latentguard.policy import Policy, load_policy
from latentguard.scan.summary import ModelInfo
from latentguard.text import first_line

if TYPE_CHECKING:
    import torch

    from latentguard.encoders import Encoder
    from latentguard.runtime import Guard
    from latentguard.spaces import LatentArray, LatentSpace

Runtime = Literal["auto", "torch", "onnx"]
Views = Literal["whole", "crops"]


@dataclass(frozen=True)
class SpaceJudge:
    """The judge of one latent space.

    info: which model it is, and what it cannot do. judge: takes (latents, whether to make heat
    maps) and returns the judgments; an exception that it raises is an error of these images.
    """

    info: ModelInfo
    judge: Callable[[LatentArray, bool], Judged]


class Judges(ABC):
    """The judges of a scan, by latent space.

    rules: the policy. models: those that took part so far. notes: sentences for people. lanes: how
    many batches are best judged at once.
    """

    lanes = 1

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.models: list[ModelInfo] = []
        self.notes: list[str] = []

    @abstractmethod
    def of(self, space: str) -> SpaceJudge | str:
        """The judge of a space's latents, or the reason why there is none."""

    def _reading(self, judge: SpaceJudge, space: str) -> SpaceJudge | str:
        """A judge that was named, if it reads the space."""
        if judge.info.space == space:
            return judge
        return f"model {judge.info.id.name} reads {judge.info.space} latents, not {space}"

    def _note_bundled(self, name: str, space: str) -> None:
        """Say that the packaged model was taken, and what would be better."""
        from latentguard.encoders.catalog import CATALOG

        if name not in CATALOG or not CATALOG[name].bundled:
            return
        better = next((e.name for e in CATALOG.values() if e.reads(space) and not e.bundled), "")
        hint = f"; for a stronger one: latentguard models get {better}" if better else ""
        self.notes.append(f"{space} latents are judged by the bundled model {name}{hint}")

    def _joined(self, info: ModelInfo, judge: Callable[[LatentArray, bool], Judged]) -> SpaceJudge:
        """Remember a model."""
        self.models.append(info)
        return SpaceJudge(info, judge)


class ModelJudges(Judges):
    """Judges with one named model, or with one for each space that occurs."""

    _named: SpaceJudge | None = None

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self._judges: dict[str, SpaceJudge | str] = {}

    def of(self, space: str) -> SpaceJudge | str:
        if self._named is not None:
            return self._reading(self._named, space)
        if space not in self._judges:
            self._judges[space] = self._choose(space)
        return self._judges[space]

    @abstractmethod
    def _choose(self, space: str) -> SpaceJudge | str:
        """The judge of a space that has not occurred yet, or why there is none."""


class TorchJudges(ModelJudges):
    """Judges with one model, or (`auto`) with the one that the policy names, or with the best one
    on this machine for each space. A model of several spaces (`nano-view`) is loaded for each.

    Raises as `scan_files` does.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        model: Encoder | str | Path,
        device: torch.device | str | None,
        space: str | Path | LatentSpace | None,
    ) -> None:
        loaded = load_policy(policy)
        super().__init__(Rules.of(loaded.to_dict()))
        self._policy, self._device = loaded, device
        _check_device(device)
        if model == "auto" and loaded.model is not None:
            model = loaded.model
        self._by_space = model if _of_several(model) else None
        self._named = None if self._by_space is not None else self._load(model, space)

    def _load(
        self, model: Encoder | str | Path, space: str | Path | LatentSpace | None
    ) -> SpaceJudge:
        from latentguard.encoders.base import traits
        from latentguard.scorer import Scorer

        scorer = Scorer(self._policy, model, space=space, device=self._device)

        def judge(latents: LatentArray, heatmaps: bool) -> Judged:
            return scorer.judge(latents.to_torch(), heatmaps=heatmaps)

        judging = scorer.thorough
        notes = str(getattr(judging.encoder, "notes", "") or "")
        info = _info(judging.bound, notes, judging.bank.unseen_contrast)
        if "views" not in self._policy.model_fields_set:  # otherwise somebody chose the views
            info = replace(info, crop_side=traits(judging.encoder).crop_side)
        return self._joined(info, judge)

    def _choose(self, space: str) -> SpaceJudge | str:
        from latentguard.encoders import best_encoder, load_encoder

        policy = self._policy
        if policy.space not in (None, space):
            return f"policy '{policy.name}' is written for {policy.space}, not {space}"
        try:
            if self._by_space == "auto":
                name = best_encoder(space)
            else:
                encoder = load_encoder(str(self._by_space), self._device, space)
        except ModelError as error:
            return str(error)
        if self._by_space != "auto":
            return self._load(encoder, space)
        self._note_bundled(name, space)
        return self._load(name, space)


class BundledJudges(ModelJudges):
    """Judges with the packaged models, without torch: the one that is named, or (`auto`) the one
    that the policy names, or the best one for each space.

    Raises as `latentguard.bundled.bundled_guard` does.
    """

    def __init__(
        self,
        policy: Policy,
        model: str,
        device: str | None,
        space: str | Path | LatentSpace | None,
        lanes: int = 1,
    ) -> None:
        from latentguard.encoders.catalog import CATALOG

        super().__init__(Rules.of(policy.to_dict()))
        self._policy, self._providers = policy, _providers(device)
        self.lanes, self._threads = lanes, _threads(lanes)
        self._model = policy.model if model == "auto" and policy.model is not None else model
        entry = CATALOG.get(self._model)
        if space is not None or (self._model != "auto" and (entry is None or entry.space)):
            named = None if space is None else _name(space)
            judge = self._load(named)
            self._judges[judge.info.space] = judge
            self._named = judge if self._model != "auto" else None

    def _choose(self, space: str) -> SpaceJudge | str:
        from latentguard.bundled.guard import chosen

        try:
            chosen(self._policy, self._model, space)
        except ModelError as error:
            return str(error)
        return self._load(space)

    def _load(self, space: str | None) -> SpaceJudge:
        from latentguard.bundled import bundled_guard
        from latentguard.files.bounds import MAX_IMAGE_CELLS

        guard = bundled_guard(
            self._policy,
            self._model,
            space=space,
            providers=self._providers,
            threads=self._threads,
            spin=False,
            max_cells=MAX_IMAGE_CELLS,
        )
        said = guard.metadata
        info = _info(guard.bound, said["model"]["notes"], said["unseen_contrast"])
        if "views" not in self._policy.model_fields_set:
            info = replace(info, crop_side=said["crop_side"])
        if self._model == "auto":
            self._note_bundled(guard.model.name, guard.space)
        return self._joined(info, _judging(guard))


class OnnxJudges(Judges):
    """Judges with the policy and the model of one exported file, without torch.

    policy: None, or one that must be the file's own.

    Raises ModelError and LatentsError for a file, a device or a space that cannot be used,
    PolicyError for another policy than the file's.
    """

    def __init__(
        self,
        path: str | Path,
        policy: Policy | str | Path | None,
        device: str | None,
        space: str | Path | LatentSpace | None,
        sha256: str | None,
        lanes: int = 1,
    ) -> None:
        from latentguard.files.bounds import MAX_IMAGE_CELLS
        from latentguard.runtime import Guard

        guard = Guard(
            path,
            sha256,
            providers=_providers(device),
            threads=_threads(lanes),
            spin=False,
            max_cells=MAX_IMAGE_CELLS,
        )
        super().__init__(guard.rules)
        self.lanes = lanes
        if policy is not None:
            self._check_policy(path, policy)
        if space is not None and _name(space) != guard.space:
            raise ModelError(f"{path} reads {guard.space} latents, not {_name(space)}")
        metadata = guard.metadata
        if metadata["seen"] is None:
            self.notes.append(
                f"{path} was exported by a version that did not record which prompts its model "
                "cannot see, so none is listed: export it again"
            )
        notes = str(metadata["model"].get("notes") or "")
        info = _info(guard.bound, notes, metadata["unseen_contrast"] or ())
        self._judge = self._joined(info, _judging(guard))

    def of(self, space: str) -> SpaceJudge | str:
        return self._reading(self._judge, space)

    def _check_policy(self, path: str | Path, policy: Policy | str | Path) -> None:
        given, own = load_policy(policy), self.rules.policy
        if given.sha256 != own.sha256:
            raise PolicyError(
                f"{path} was exported with policy '{own.name}' ({own.sha256[:12]}) and "
                f"cannot judge by another one: give it '{given.name}' ({given.sha256[:12]}) with "
                "`latentguard export swap`"
            )
        if Rules.of(given.to_dict()) != self.rules:
            raise PolicyError(
                f"{path} names policy '{own.name}' ({own.sha256[:12]}), but its concepts or "
                "thresholds are not those of that policy: export it again, and pin it by --sha256"
            )


def _of_several(model: Encoder | str | Path) -> bool:
    from latentguard.encoders import needs_space

    return isinstance(model, (str, Path)) and needs_space(model)


def _judging(guard: Guard) -> Callable[[LatentArray, bool], Judged]:
    def judge(latents: LatentArray, heatmaps: bool) -> Judged:
        return guard.judge(latents, heatmaps=heatmaps)

    return judge


def _info(bound: BoundRules, notes: str, unseen_contrast: Sequence[str]) -> ModelInfo:
    """A model that judges by a policy.

    Raises PolicyError if this model lacks a threshold, because every image would be an error.
    """
    assert bound.model is not None
    assert bound.space is not None
    uncovered: list[str] = []
    partly: dict[str, tuple[str, ...]] = {}
    thresholds: dict[str, float] = {}
    for k, name in enumerate(bound.rules.ids):
        if not bound.covered[k]:
            uncovered.append(name)
            continue
        if bound.unseen[k]:
            partly[name] = bound.unseen[k]
        try:
            thresholds[name] = bound.threshold(k)
        except ValueError as error:
            raise PolicyError(f"policy '{bound.rules.policy.name}': {error}") from error
    return ModelInfo(
        bound.model,
        bound.space,
        notes,
        tuple(uncovered),
        thresholds,
        partly,
        tuple(unseen_contrast),
    )


def _check_device(device: torch.device | str | None) -> None:
    """Raises ModelError for a device that this machine does not have."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = first_line(error, "no message")
        raise ModelError(f"device {str(device)!r} cannot be used: {said}") from error


def _providers(device: str | None) -> list[str | tuple[str, dict[str, str]]] | None:
    """`cpu`, `cuda` or `cuda:1` as ONNX Runtime calls them."""
    if device is None:
        return None
    name, _, index = str(device).partition(":")
    if name == "cpu" and not index:
        return ["CPUExecutionProvider"]
    if name == "cuda" and (not index or index.isdigit()):
        return [("CUDAExecutionProvider", {"device_id": index or "0"}), "CPUExecutionProvider"]
    raise ModelError(f"device {str(device)!r} cannot be used: with ONNX Runtime it is cpu or cuda")


MOST_LANES = 4
"""Each lane has the memory of a run of its own."""


def default_lanes() -> int:
    """How many batches ONNX Runtime judges at once on this machine, with an equal share of its
    cores each: that is faster than one batch with all of them, of which each operator waits for
    the slowest."""
    return min(MOST_LANES, _cores())


def _threads(lanes: int) -> int | None:
    """The threads of one run of ONNX Runtime; None leaves them to it. Threads that wait do not
    spin: they would take these cores from readers."""
    return max(1, _cores() // lanes) if lanes > 1 else _told_threads()


def _cores() -> int:
    return _told_threads() or os.cpu_count() or 1


def _told_threads() -> int | None:
    """ONNX Runtime does not look for this variable itself. Ray sets it to the cores of an actor."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isascii() and said.isdigit() and 0 < int(said) < 1024 else None


def _name(space: str | Path | LatentSpace) -> str:
    from latentguard.spaces import LatentSpace

    return LatentSpace.of(space).name


def check_schemes(rules: Rules, names: Sequence[str]) -> None:
    """Raises PolicyError for a published scheme that the policy maps no concept to."""
    for name in names:
        try:
            rules.scheme(name)
        except ValueError as error:
            raise PolicyError(str(error)) from error


def make_judges(
    policy: Policy | str | Path | None,
    model: Encoder | str | Path = "auto",
    *,
    space: str | Path | LatentSpace | None = None,
    device: torch.device | str | None = None,
    runtime: Runtime = "auto",
    sha256: str | None = None,
    views: Views | None = None,
    lanes: int = 1,
) -> Judges:
    """The judges of a scan. Options and errors are those of `scan_files`.

    lanes: how many batches the caller judges at once, where ONNX Runtime does; torch judges one.
    """
    where = None if device is None else str(device)
    if resolved(runtime, model) == "onnx":
        if not isinstance(model, (str, Path)):
            raise ModelError("an Encoder is judged with torch: runtime='torch'")
        if _exported(model):
            if views is not None:
                raise ModelError("an exported file has its own views: leave --views out")
            return OnnxJudges(model, policy, where, space, sha256, lanes)
    elif isinstance(model, (str, Path)) and str(model).endswith(".onnx"):
        raise ModelError(f"{model} is an exported file: give --runtime onnx, or leave it out")
    if sha256 is not None:
        raise ModelError("--sha256 pins an exported file: give --model FILE.onnx, too")
    policy = load_policy("default" if policy is None else policy)
    if views is not None:
        policy = policy.with_views(views)
    if resolved(runtime, model) == "onnx":
        return BundledJudges(policy, str(model), where, space, lanes)
    return TorchJudges(policy, model, device, space)


def _exported(model: str | Path) -> bool:
    """Whether the onnx runtime should read a model as an exported file, and not as a name."""
    from latentguard.encoders.catalog import CATALOG

    name = str(model)
    return not (name == "auto" or name in CATALOG or name.endswith(".safetensors"))


def resolved(runtime: Runtime, model: Encoder | str | Path) -> Literal["torch", "onnx"]:
    """What `auto` means: the ONNX runtime for an exported file, and if torch is not installed."""
    if runtime != "auto":
        return runtime
    named = isinstance(model, (str, Path))
    if named and (str(model).endswith(".onnx") or find_spec("torch") is None):
        return "onnx"
    return "torch"
