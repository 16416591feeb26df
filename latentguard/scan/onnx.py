"""Judging with an exported file: ONNX Runtime and NumPy, no torch."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from latentguard.errors import ModelError, PolicyError
from latentguard.files.bounds import MAX_IMAGE_CELLS
from latentguard.scan.judging import Judge, describe
from latentguard.scan.summary import ModelInfo
from latentguard.verdict import Verdict, unseen_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from latentguard.policy import Policy
    from latentguard.runtime import Guard
    from latentguard.spaces import LatentArray, LatentSpace


class OnnxModel:
    """A runtime.Guard, and what a scan says of it."""

    def __init__(self, guard: Guard, info: ModelInfo) -> None:
        self.info = info
        self._guard = guard

    def verdicts(self, latents: LatentArray) -> list[Verdict]:
        verdicts = self._guard.scan(latents)
        errors = {verdict.error for verdict in verdicts}
        if len(latents) > 1 and len(errors) == 1 and None not in errors:
            # The scan tries them one by one then, so that only those fail that have to.
            raise ModelError(str(verdicts[0].error))
        return verdicts

    def heatmaps(self, latents: LatentArray) -> NDArray[np.float32]:
        return self._guard.heatmaps(latents)


class OnnxJudge(Judge):
    """Judges with the policy and the model of one exported file.

    policy: None, or one that must be the file's own.

    Raises ModelError and LatentsError for a file, a device or a space that cannot be used,
    PolicyError for another policy than the file's.
    """

    def __init__(
        self,
        path: str | Path,
        policy: Policy | str | Path | None,
        device: str | None,
        space: str | LatentSpace | None,
        sha256: str | None,
    ) -> None:
        from latentguard.runtime import Guard

        begun = perf_counter()
        guard = Guard(path, sha256, providers=_providers(device), max_cells=MAX_IMAGE_CELLS)
        super().__init__(guard.policy)
        if policy is not None:
            self._check_policy(path, policy)
        if space is not None and _name(space) != guard.space:
            raise ModelError(f"{path} reads {guard.space} latents, not {_name(space)}")
        metadata = guard.metadata
        info = describe(
            self.plain,
            guard.model,
            guard.space,
            str(metadata["model"].get("notes") or ""),
            unseen_prompts(self.plain, metadata["covered"], metadata["seen"]),
            metadata["logit_scale"],
            metadata["unseen_contrast"] or (),
        )
        if metadata["seen"] is None:
            self.notes.append(
                f"{path} was exported by a version that did not record which prompts its model "
                "cannot see, so none is named: export it anew"
            )
        self.models.append(info)
        self._model = OnnxModel(guard, info)
        self.loading += perf_counter() - begun

    def model_of(self, space: str) -> OnnxModel | str:
        reads = self._model.info.space
        if reads == space:
            return self._model
        return f"model {self._model.info.id.name} reads {reads} latents, not {space}"

    def _check_policy(self, path: str | Path, policy: Policy | str | Path) -> None:
        from latentguard.policy import load_policy

        given = load_policy(policy)
        if given.sha256 != self.policy_id.sha256:
            raise PolicyError(
                f"{path} was exported with policy '{self.policy_id.name}' "
                f"({self.policy_id.sha256[:12]}) and judges by no other: give it '{given.name}' "
                f"({given.sha256[:12]}) with `latentguard export swap`"
            )


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


def _name(space: str | LatentSpace) -> str:
    from latentguard.spaces import LatentSpace

    return LatentSpace.get(space).name
