"""Guard: an exported .onnx file, latents in, verdicts out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentsError, ModelError
from latentguard.runtime.artefact import HEATMAP, INPUT, OUTPUTS, open_artefact
from latentguard.runtime.batching import Batcher, Batching, Outputs, Overloaded
from latentguard.runtime.session import Provider, create_session, first_line
from latentguard.spaces import LatentSpace
from latentguard.spaces.arrays import LatentArray, unpack, widened
from latentguard.verdict import Verdict, decide, failed

logger = logging.getLogger("latentguard.runtime")
logger.addHandler(logging.NullHandler())

Array = NDArray[Any]

MAX_CELLS = 256 * 256
"""Latent cells of one image by default: 2,048 x 2,048 pixels."""
RUN_CELLS = 16 * 64 * 64
"""Latent cells of one run: 16 images of 512 x 512 pixels. Larger arrays are run in pieces, so that
memory does not grow with their length."""


class Guard:
    """An exported policy and model.

    Thread-safe: one Guard serves a process. Without torch.

    Args:
        path: a file that `latentguard export onnx` wrote.
        sha256: of that file; pin it where the file comes from elsewhere.
        providers: ONNX Runtime's execution providers, best first, a name or a name with options;
            None is CUDA where it can be used, then the CPU.
        threads: within one run on the CPU; None leaves it to ONNX Runtime.
        spin: threads without work wait for it in a loop: the fastest where the cores are the
            guard's alone, the slowest where they are not.
        batching: gather arrays of several threads into batches; None runs each by itself.
        warm_up: run once, so that the first request is as fast as the others, and the policy is
            known to fit the network.
        max_cells: latent cells that an image may have; memory grows with their square in some
            models.

    Raises:
        ModelError: the file is not one of ours, was changed, or a provider is missing.
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
        artefact = open_artefact(path, sha256)
        self.path = artefact.path
        self.sha256 = artefact.sha256
        self.metadata = artefact.metadata
        self._space = LatentSpace.get(self.metadata["space"])
        self._max_cells = max_cells
        self._names = [*OUTPUTS, HEATMAP] if artefact.heatmaps else [*OUTPUTS]
        self._session = create_session(artefact, providers, threads, spin)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._bind = self.providers[0] != "CPUExecutionProvider"
        self._lock = threading.Lock()
        if warm_up:
            self._check_run()
        self._batcher = None if batching is None else Batcher(self._run, batching)

    # -- what it is --------------------------------------------------------------------------

    @property
    def policy(self) -> dict[str, Any]:
        """The policy as plain data."""
        policy: dict[str, Any] = self.metadata["policy"]
        return policy

    @property
    def model(self) -> tuple[str, str]:
        """Name and SHA-256 of the encoder."""
        return self.metadata["model"]["name"], self.metadata["model"]["sha256"]

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

        Args:
            latents: [B, C, H, W] float16, float32 or float64, in the space and scaling of the file;
                packed tokens [B, H/2 * W/2, 4 C] with `height` and `width` in latent cells; or a
                LatentArray, which carries its convention and is converted.
            noise_level: noise-to-signal ratio, 0 is clean.
            final: nothing follows these latents.

        Raises:
            LatentsError: another shape, dtype or space, or an image over `max_cells`.
            Overloaded: with batching, when too many wait or the answer takes too long.

        Whatever else goes wrong, NaN in an image or an error of ONNX Runtime, gives the decision
        that the policy's `on_error` names.
        """
        array = self._input(latents, height, width)
        try:
            outputs = self._outputs(array)
        except Overloaded:
            raise
        # Fail closed: none of these images has been judged.
        except Exception as error:
            logger.exception("%d images could not be judged", len(array))
            verdict = failed(f"{type(error).__name__}: {error}", self.policy, noise_level)
            return [verdict] * len(array)
        return self._decide(outputs, noise_level, final)

    def scores(
        self, latents: Array | LatentArray, *, height: int | None = None, width: int | None = None
    ) -> Outputs:
        """probability, margin, best_prompt [B, K] and embedding [B, dim], as the graph gives them.

        Rows of images that are not finite are NaN. Raises as `scan` does, and whatever ONNX Runtime
        raises.
        """
        return self._outputs(self._input(latents, height, width))

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

        Raises ModelError where the file was exported without them, and as `scores` does.
        """
        if HEATMAP not in self._names:
            raise ModelError(f"{self.path}: was exported without heat maps: use --heatmaps")
        outputs = self.scores(latents, height=height, width=width)
        return outputs[HEATMAP].astype(np.float32, copy=False)

    def close(self) -> None:
        """Answer what waits, and stop the batching thread."""
        if self._batcher is not None:
            self._batcher.close()

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
        try:
            array = np.asarray(latents)
        except Exception as error:  # ragged lists, tensors on a GPU, objects that are no arrays
            kind = type(latents).__name__
            raise LatentsError(f"latents must be a NumPy array, {kind} is none: {error}") from error
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
        return widened((latents.standard() if self.scaled else latents.raw()).array)

    def _outputs(self, array: NDArray[np.float32]) -> Outputs:
        finite = np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))
        # Clips in a network can hide a NaN; no image gets its score from one.
        safe = array if finite.all() else np.where(finite[:, None, None, None], array, 0)
        run = self._run if self._batcher is None else self._batcher
        step = max(1, RUN_CELLS // (array.shape[2] * array.shape[3]))
        parts = [run(safe[begin : begin + step]) for begin in range(0, len(array), step)]
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, value in outputs.items():
            if len(value) != len(array):
                raise RuntimeError(f"{self.path.name} gives {len(value)} rows of {name}")
            if name != "best_prompt":
                value[~finite] = np.nan
        return outputs

    def _run(self, array: NDArray[np.float32]) -> Outputs:
        if not self._bind:
            values = self._session.run(self._names, {INPUT: array})
        else:
            binding = self._session.io_binding()
            binding.bind_cpu_input(INPUT, array)
            for name in self._names:
                binding.bind_output(name)
            # Two runs at a time would share the stream, and the memory of a captured graph.
            with self._lock:
                self._session.run_with_iobinding(binding)
            values = binding.copy_outputs_to_cpu()
        return dict(zip(self._names, values, strict=True))

    def _decide(self, outputs: Outputs, noise_level: float, final: bool) -> list[Verdict]:
        return decide(
            outputs["probability"],
            outputs["margin"],
            outputs["best_prompt"],
            policy=self.policy,
            prompts=self.metadata["prompts"],
            covered=self.metadata["covered"],
            noise_level=noise_level,
            final=final,
            model=self.model,
            space=self.space,
        )

    def _check_run(self) -> None:
        """Raise ModelError where the network does not run, or its scores are not the policy's."""
        sides = self.metadata["height"] or 32, self.metadata["width"] or 32
        shape = (1, self.metadata["channels"], *sides)
        array = np.random.default_rng(0).standard_normal(shape, np.float32)
        try:
            outputs = self._run(array)
        except Exception as error:
            raise ModelError(f"{self.path}: does not run: {first_line(error)}") from error
        verdicts = self._decide(outputs, 0.0, True)
        # A threshold that lacks a calibration is an error of that noise level, not of the file.
        if len(verdicts) != 1 or not verdicts[0].concepts:
            raise ModelError(f"{self.path}: does not fit its policy: {verdicts[0].error}")
