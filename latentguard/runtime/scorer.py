"""Guard: an exported .onnx file, latents in, verdicts out; one network, or a cascade of two."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError, ModelError
from latentguard.judge import (
    BoundRules,
    CascadeJudge,
    Judge,
    Judged,
    ModelId,
    Rules,
    Verdict,
    failed,
)
from latentguard.runtime.artifact import Artifact, open_artifact
from latentguard.runtime.batching import Batching, Outputs, Overloaded
from latentguard.runtime.names import HEATMAP
from latentguard.runtime.network import Network
from latentguard.runtime.session import Provider
from latentguard.spaces import LatentSpace
from latentguard.spaces.arrays import LatentArray, check_unmasked, unpack, widened

logger = logging.getLogger("latentguard.runtime")
logger.addHandler(logging.NullHandler())

Array = NDArray[Any]

MAX_CELLS = 256 * 256
"""Latent cells of one image by default: 2,048 x 2,048 pixels."""


class Guard:
    """An exported policy and model and, if the policy has a `cascade`, its first model.

    Thread-safe: one Guard serves a process. It needs no torch.

    Args:
        path: a file that `latentguard export onnx` wrote. The first model of a cascade lies next to
            it.
        sha256: the SHA-256 that the file must have. Give it if the file comes from elsewhere.
        providers: ONNX Runtime's execution providers, best first, a name or a name with options;
            None is CUDA if it can be used, then the CPU.
        threads: within one run on the CPU; None leaves it to ONNX Runtime.
        spin: threads without work wait for it in a loop. This is fastest if the guard has the cores
            to itself, and slowest if it does not.
        batching: gather arrays of several threads into batches; None runs each by itself.
        warm_up: run once, so that the first request is as fast as the others, and the policy is
            known to fit the network.
        max_cells: latent cells that an image may have; the memory of some models grows with their
            square.

    Raises:
        ModelError: the file is not an export of latentguard, was changed, or a provider is missing.
    """

    def __init__(
        self,
        path: str | Path,
        sha256: str | None = None,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        spin: bool = True,
        batching: Batching | None = None,
        warm_up: bool = True,
        max_cells: int = MAX_CELLS,
    ) -> None:
        artifact = open_artifact(path, sha256)
        _check_size(artifact, max_cells)
        main = Network(artifact, providers, threads, spin, warm_up)
        first: Network | None = None
        if artifact.first is not None:
            first = Network(artifact.first, providers, threads, spin, warm_up)
        self._set(artifact, main, first, batching, max_cells)

    @classmethod
    def over(
        cls,
        artifact: Artifact,
        network: Network,
        *,
        batching: Batching | None = None,
        max_cells: int = MAX_CELLS,
    ) -> Self:
        """A Guard over an existing network; `artifact` is what the network was made of."""
        guard = cls.__new__(cls)
        guard._set(artifact, network, None, batching, max_cells)
        return guard

    def _set(
        self,
        artifact: Artifact,
        main: Network,
        first: Network | None,
        batching: Batching | None,
        max_cells: int,
    ) -> None:
        self.path = artifact.path
        self.sha256 = artifact.sha256
        self.metadata = artifact.metadata
        own = self.metadata["own_space"]
        self._space = (
            LatentSpace.get(self.metadata["space"]) if own is None else LatentSpace.from_dict(own)
        )
        self._max_cells = max_cells
        self._main, self._first = main, first
        self.providers: tuple[str, ...] = main.providers
        # A first model that reads images whole must not allow what was not looked at in crops.
        alone = first is None or self.policy.get("views") == "crops"
        self._judge: Judge[Array] = main if first is None or alone else self._cascade(first)
        self._networks = [main] if first is None else [first, main]
        if batching is not None:
            for network in self._networks:
                network.gather(batching)

    # -- what it is --------------------------------------------------------------------------

    @property
    def policy(self) -> dict[str, Any]:
        """The policy as plain data."""
        policy: dict[str, Any] = self.metadata["policy"]
        return policy

    @property
    def bound(self) -> BoundRules:
        """The policy's rules for the model's scores; of a cascade, for the second one's."""
        return self._main.bound

    @property
    def rules(self) -> Rules:
        """The policy as the judge reads it."""
        return self.bound.rules

    @property
    def model(self) -> ModelId:
        """Name and SHA-256 of the encoder; of a cascade, of the second one."""
        return self._main.model

    @property
    def first_model(self) -> ModelId | None:
        """Name and SHA-256 of a cascade's first encoder."""
        return None if self._first is None else self._first.model

    @property
    def space(self) -> str:
        """The latent space that it reads."""
        return str(self.metadata["space"])

    @property
    def scaled(self) -> bool:
        """Whether it reads latents as a pipeline denoises them, or as the VAE encodes (False)."""
        return bool(self.metadata["scaled"])

    # -- what it does ------------------------------------------------------------------------

    def scan(
        self,
        latents: Array | LatentArray,
        noise_level: float = 0.0,
        final: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Verdict]:
        """One verdict for each image.

        With a `cascade` in the policy its first model judges, and the other one judges the images
        of which the first is not sure. The reason says if the first model decided.

        Args:
            latents: [B, C, H, W] float16, float32 or float64, in the space and scaling of the file;
                packed tokens [B, H/2 * W/2, 4 C] with `height` and `width` in latent cells; or a
                LatentArray, which carries its space and scaling and is converted.
            noise_level: noise-to-signal ratio, 0 is clean.
            final: no further step follows these latents.

        Raises:
            LatentsError: another shape, dtype or space, or an image over `max_cells`.
            Overloaded: with batching, if too many wait or the answer takes too long.

        Any other failure, such as NaN in an image or an error of ONNX Runtime, gives the decision
        that the policy's `on_error` names.
        """
        array = self._input(latents, height, width)
        try:
            return list(self._judge.judge(array, noise_level, final).verdicts)
        except Overloaded:
            raise
        # Fail closed: none of these images has been judged.
        except Exception as error:
            logger.exception("%d images could not be judged", len(array))
            verdict = failed(f"{type(error).__name__}: {error}", self.rules, noise_level)
            return [verdict] * len(array)

    def judge(
        self,
        latents: Array | LatentArray,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        """Verdicts and, if asked for, heat maps from the same run.

        Takes latents as `scan` does, but raises errors instead of judging by `on_error`.
        """
        return self._judge.judge(self._input(latents, None, None), noise_level, final, heatmaps)

    def scores(
        self, latents: Array | LatentArray, *, height: int | None = None, width: int | None = None
    ) -> Outputs:
        """probability, margin, best_prompt [B, K] and embedding [B, dim], as the graph gives them.

        With a cascade these are the second model's scores of every image. Rows of images that are
        not finite are NaN. Raises as `scan` does, and passes on errors of ONNX Runtime.
        """
        return self._main.outputs(self._input(latents, height, width))

    def embed(
        self, latents: Array | LatentArray, *, height: int | None = None, width: int | None = None
    ) -> NDArray[np.float32]:
        """Unit-norm embeddings [B, dim]. Raises as `scores` does."""
        outputs = self.scores(latents, height=height, width=width)
        return outputs["embedding"].astype(np.float32, copy=False)

    def heatmaps(
        self, latents: Array | LatentArray, *, height: int | None = None, width: int | None = None
    ) -> NDArray[np.float32]:
        """Margins over the encoder's grid, [B, K, h, w].

        Raises ModelError if the file was exported without them, and as `scores` does.
        """
        if not self._main.has_heatmaps:
            raise ModelError(self._main.no_heatmaps)
        outputs = self._main.outputs(self._input(latents, height, width), heatmaps=True)
        return outputs[HEATMAP].astype(np.float32, copy=False)

    def close(self) -> None:
        """Answer the arrays that wait, and stop the batching threads."""
        for network in self._networks:
            network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------

    def _input(
        self, latents: Array | LatentArray, height: int | None, width: int | None
    ) -> NDArray[np.float32]:
        """[B, C, H, W] float32, contiguous. Raises LatentsError, naming what would be right."""
        if isinstance(latents, LatentArray):
            latents = self._converted(latents)
        check_unmasked(latents)
        try:
            array = np.asarray(latents)
        except Exception as error:  # ragged lists, tensors on a GPU, objects that are no arrays
            kind = type(latents).__name__
            raise LatentsError(
                f"latents must be a NumPy array, {kind} is not one: {error}"
            ) from error
        if array.dtype.kind != "f":
            raise LatentsError(f"latents must be floating point, got {array.dtype}")
        space = self._space
        if array.ndim == 3 and space.packed_patch > 1:
            array = unpack(array, space, height, width)
        else:
            space.size(array.shape, "spatial", height, width)
        cells = array.shape[2] * array.shape[3]
        if array.size == 0:
            raise LatentsError(f"latents must not be empty, got shape {list(array.shape)}")
        if cells > self._max_cells:
            raise LatentsError(
                f"an image of {array.shape[2]}x{array.shape[3]} latent cells is over the limit of "
                f"{self._max_cells} (max_cells)"
            )
        sides = (self.metadata["height"], self.metadata["width"])
        if None not in sides and array.shape[2:] != sides:
            raise LatentsError(
                f"{self.path.name} was exported for {sides[0]}x{sides[1]} latent cells, got "
                f"{array.shape[2]}x{array.shape[3]}: export one for that size"
            )
        with np.errstate(over="ignore"):  # what overflows is found to be infinite
            return np.ascontiguousarray(array, dtype=np.float32)

    def _converted(self, latents: LatentArray) -> Array:
        """Its numbers in the scaling that the file reads; LatentsError for another space."""
        if latents.space.name != self.space:
            raise LatentsError(
                f"{self.path.name} reads {self.space} latents, not {latents.space.name}"
            )
        return widened(latents.to_standard(self.scaled).array)

    def _cascade(self, first: Network) -> CascadeJudge[Array]:
        """The judge that asks `first` first. Raises ModelError if the two do not fit together."""
        cascade = self.rules.cascade
        assert cascade is not None  # the artifact was checked
        try:
            return CascadeJudge(first, self._main, cascade.unsure, lambda array, rows: array[rows])
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error


def _check_size(artifact: Artifact, max_cells: int) -> None:
    """Raise ModelError where a file is for images over the limit."""
    sides = (artifact.metadata["height"] or 1, artifact.metadata["width"] or 1)
    if sides[0] * sides[1] > max_cells:
        raise ModelError(
            f"{artifact.path}: was exported for {sides[0]}x{sides[1]} latent cells, over the limit "
            f"of {max_cells} (max_cells)"
        )
