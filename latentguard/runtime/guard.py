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
from latentguard.runtime.batching import Batcher, Batching, Outputs
from latentguard.verdict import Verdict, decide, failed

logger = logging.getLogger("latentguard.runtime")

Array = NDArray[Any]


class Guard:
    """An exported policy and model.

    Thread-safe: one Guard serves a process. Without torch and without pydantic.

    Args:
        path: a file that `latentguard export onnx` wrote.
        sha256: of the whole file; pin it where the file comes from elsewhere.
        providers: ONNX Runtime's execution providers, best first; None is CUDA where it is
            available, then the CPU.
        threads: within one run on the CPU; None leaves it to ONNX Runtime.
        batching: gather arrays of several threads into batches; None runs each by itself.
        warm_up: run once on zeros, so that the first request is as fast as the others.

    Raises:
        ModelError: the file is not one of ours, was changed, or a provider is missing.
    """

    def __init__(
        self,
        path: str | Path,
        sha256: str | None = None,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        batching: Batching | None = None,
        warm_up: bool = True,
    ) -> None:
        artefact = open_artefact(path, sha256)
        self.path = artefact.path
        self.sha256 = artefact.sha256
        self.metadata = artefact.metadata
        self._heatmaps = artefact.heatmaps
        self._session = _session(artefact.path, providers, threads)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._bind = self.providers[0] != "CPUExecutionProvider"
        self._lock = threading.Lock()
        self._batcher = None if batching is None else Batcher(self._run, batching)
        if warm_up:
            self._run(self._zeros())

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
        latents: Array,
        noise_level: float = 0.0,
        final: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Verdict]:
        """One verdict for each image.

        Args:
            latents: [B, C, H, W] float16, float32 or float64, in the space and scaling of the file;
                or packed tokens [B, H/2 * W/2, 4 C] with `height` and `width` in latent cells.
            noise_level: noise-to-signal ratio, 0 is clean.
            final: nothing follows these latents.

        Raises LatentsError for another shape or dtype. Whatever goes wrong after that, NaN in an
        image or an error of the runtime, gives the decision that the policy's `on_error` names.
        """
        array = self._input(latents, height, width)
        try:
            outputs = self._outputs(array)
        # Fail closed: none of these images has been judged.
        except Exception as error:
            logger.exception("%d images could not be judged", len(array))
            verdict = failed(f"{type(error).__name__}: {error}", self.policy, noise_level)
            return [verdict] * len(array)
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

    def scores(
        self, latents: Array, *, height: int | None = None, width: int | None = None
    ) -> Outputs:
        """probability, margin, best_prompt [B, K] and embedding [B, dim], as the graph gives them.

        Rows of images that are not finite are NaN. Raises LatentsError as `scan` does.
        """
        return self._outputs(self._input(latents, height, width))

    def embed(self, latents: Array) -> NDArray[np.float32]:
        """Unit-norm embeddings [B, dim]. Raises LatentsError as `scan` does."""
        return self.scores(latents)["embedding"].astype(np.float32, copy=False)

    def heatmaps(self, latents: Array) -> NDArray[np.float32]:
        """Margins over the encoder's grid, [B, K, h, w].

        Raises ModelError where the file was exported without them.
        """
        if not self._heatmaps:
            raise ModelError(f"{self.path}: was exported without heat maps: use --heatmaps")
        return self._outputs(self._input(latents, None, None))[HEATMAP].astype(np.float32)

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

    def _input(self, latents: Array, height: int | None, width: int | None) -> NDArray[np.float32]:
        array = np.asarray(latents)
        if array.dtype.kind != "f":
            raise LatentsError(f"latents must be floating point, got {array.dtype}")
        channels, patch = self.metadata["channels"], self.metadata["packed_patch"]
        if array.ndim == 3 and patch > 1:
            array = _unpacked(array, channels, patch, height, width)
        sides = tuple(self.metadata[key] for key in ("height", "width"))
        fits = array.ndim == 4 and array.shape[1] == channels and len(array) > 0
        if fits and None not in sides:
            fits = array.shape[2:] == sides
        if not fits or 0 in array.shape:
            wanted = "H, W" if None in sides else f"{sides[0]}, {sides[1]}"
            raise LatentsError(
                f"{self.path.name} reads {self.space} latents of shape [B, {channels}, {wanted}], "
                f"got {list(np.shape(latents))}"
            )
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)

    def _outputs(self, array: NDArray[np.float32]) -> Outputs:
        finite = np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))
        # Clips in a network can hide a NaN; no image gets its score from one.
        run = self._run if self._batcher is None else self._batcher
        outputs = run(array if finite.all() else np.where(finite[:, None, None, None], array, 0))
        if not finite.all():
            outputs = {name: value.copy() for name, value in outputs.items()}
            for name, value in outputs.items():
                if name != "best_prompt":
                    value[~finite] = np.nan
        return outputs

    def _run(self, array: NDArray[np.float32]) -> Outputs:
        names = [*OUTPUTS, HEATMAP] if self._heatmaps else [*OUTPUTS]
        if not self._bind:
            values = self._session.run(names, {INPUT: array})
        else:
            binding = self._session.io_binding()
            binding.bind_cpu_input(INPUT, array)
            for name in names:
                binding.bind_output(name)
            with self._lock:
                self._session.run_with_iobinding(binding)
            values = binding.copy_outputs_to_cpu()
        return dict(zip(names, values, strict=True))

    def _zeros(self) -> NDArray[np.float32]:
        side = self.metadata["height"] or 32, self.metadata["width"] or 32
        return np.zeros((1, self.metadata["channels"], *side), np.float32)


def _unpacked(
    tokens: Array, channels: int, patch: int, height: int | None, width: int | None
) -> Array:
    """Tokens [B, H/p * W/p, C p p] (channel c p p + dy p + dx) to [B, C, H, W]."""
    if height is None or width is None:
        raise LatentsError("packed latents do not carry their size: give height and width in cells")
    rows, columns = height // patch, width // patch
    if tokens.shape[1:] != (rows * columns, channels * patch**2):
        raise LatentsError(
            f"packed latents of {height}x{width} cells must be [B, {rows * columns}, "
            f"{channels * patch**2}], got {list(tokens.shape)}"
        )
    cells = tokens.reshape(-1, rows, columns, channels, patch, patch)
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * patch, columns * patch)


def _session(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("this needs onnxruntime: pip install 'latentguard[onnx]'") from error
    available = onnxruntime.get_available_providers()
    if providers is None:
        wanted = [
            name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available
        ]
    else:
        wanted = list(providers)
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        raise ModelError(
            f"ONNX Runtime has no {', '.join(missing) or 'provider'} here, but "
            f"{', '.join(available)}: install onnxruntime-gpu, or choose another provider"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    # Its exceptions have no common class of their own.
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"{path}: ONNX Runtime refuses it: {first[0] if first else error}"
        ) from error
