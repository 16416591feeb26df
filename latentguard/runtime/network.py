"""The network of one exported file, in a session: arrays in, scores and verdicts out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import ModelError
from latentguard.judge import BoundRules, Heatmaps, Judged, ModelId, Rules, Verdict, decide
from latentguard.judge.numbers import usable
from latentguard.runtime.artifact import Artifact
from latentguard.runtime.batching import Array, Batcher, Batching, Outputs
from latentguard.runtime.names import HEATMAP, INPUT, OUTPUTS
from latentguard.runtime.session import Provider, create_session, reason

RUN_CELLS = 16 * 64 * 64
"""Latent cells of one run: 16 images of 512 x 512 pixels. Larger arrays are run in pieces, so that
memory does not grow with their length."""


class Network:
    """A network and the policy that its scores are judged by. Thread-safe.

    Args and errors: as of `latentguard.runtime.Guard`.
    """

    def __init__(
        self,
        artifact: Artifact,
        providers: Sequence[Provider] | None,
        threads: int | None,
        spin: bool,
        warm_up: bool,
    ) -> None:
        self.path = artifact.path
        self.metadata = artifact.metadata
        self.has_heatmaps = artifact.heatmaps
        self.bound = _bound(artifact)
        self._session = create_session(artifact, providers, threads, spin)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._bind = self.providers[0] != "CPUExecutionProvider"
        self._lock = threading.Lock()
        self._batcher: Batcher | None = None
        if warm_up:
            self.check()

    @property
    def model(self) -> ModelId:
        """Name and SHA-256 of the encoder."""
        return _model(self.metadata)

    def judge(
        self,
        latents: Array,
        noise_level: float = 0.0,
        final: bool = True,
        heatmaps: bool = False,
    ) -> Judged:
        """Verdicts on [B, C, H, W]; heat maps from the same run. Raises as `outputs` does."""
        if not heatmaps:
            return Judged(self._decide(self.outputs(latents), noise_level, final))
        if not self.has_heatmaps:
            verdicts = self._decide(self.outputs(latents), noise_level, final)
            return Judged(verdicts, Heatmaps(problem=self.no_heatmaps))
        try:
            outputs = self.outputs(latents, heatmaps=True)
            maps = Heatmaps(self._maps(outputs))
        except Exception as error:  # they are an addition: the verdicts do not need them
            outputs, maps = self.outputs(latents), Heatmaps.failed(error)
        return Judged(self._decide(outputs, noise_level, final), maps)

    def _maps(self, outputs: Outputs) -> NDArray[np.float32]:
        """The heat maps [B, K, h, w]. Raises ValueError where they are not of that shape."""
        maps, scores = outputs[HEATMAP], outputs["margin"]
        if maps.ndim != 4 or maps.shape[:2] != scores.shape:
            raise ValueError(
                f"{self.path.name} gives heat maps {list(maps.shape)} for scores "
                f"{list(scores.shape)}, they must be [images, concepts, height, width]"
            )
        return maps.astype(np.float32, copy=False)

    @property
    def no_heatmaps(self) -> str:
        """The error of a file without heat maps."""
        return f"{self.path}: was exported without heat maps: use --heatmaps"

    def outputs(self, array: Array, heatmaps: bool = False) -> Outputs:
        """The outputs of the graph for [B, C, H, W]. Rows of images with numbers that are not
        finite, or beyond every latent's (`judge.numbers`), are NaN.

        Heat maps are only computed if asked for, and never together with the arrays of other
        threads. Raises Overloaded, and the errors of ONNX Runtime.
        """
        # Clips in a network can hide a NaN; no image gets its score from one.
        good = usable(array)
        safe = array if good.all() else np.where(good[:, None, None, None], array, 0)
        run: Callable[[Array], Outputs] = self._run
        if heatmaps:
            run = self._run_with_heatmaps
        elif self._batcher is not None:
            run = self._batcher
        step = max(1, RUN_CELLS // (array.shape[2] * array.shape[3]))
        parts = [run(safe[begin : begin + step]) for begin in range(0, len(array), step)]
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, value in outputs.items():
            if len(value) != len(array):
                raise RuntimeError(f"{self.path.name} gives {len(value)} rows of {name}")
            if name != "best_prompt":
                value[~good] = np.nan
        return outputs

    def gather(self, batching: Batching) -> None:
        """From now on, make batches of the arrays of several threads."""
        self._batcher = Batcher(self._run, batching)

    def close(self) -> None:
        """Answer the arrays that wait, and stop the batching thread."""
        if self._batcher is not None:
            self._batcher.close()

    def _run(self, array: NDArray[np.float32]) -> Outputs:
        return self._run_for(array, OUTPUTS)

    def _run_with_heatmaps(self, array: NDArray[np.float32]) -> Outputs:
        return self._run_for(array, (*OUTPUTS, HEATMAP))

    def _run_for(self, array: NDArray[np.float32], names: Sequence[str]) -> Outputs:
        inputs = self._inputs(array)
        if not self._bind:
            values = self._session.run(list(names), inputs)
        else:
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            for name in names:
                binding.bind_output(name)
            # Two runs at a time would share the stream, and the memory of a captured graph.
            with self._lock:
                self._session.run_with_iobinding(binding)
            values = binding.copy_outputs_to_cpu()
        return dict(zip(names, values, strict=True))

    def _inputs(self, array: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The inputs of the graph for [B, C, H, W]."""
        return {INPUT: array}

    def _decide(
        self, outputs: Outputs, noise_level: float = 0.0, final: bool = True
    ) -> list[Verdict]:
        return decide(
            outputs["probability"],
            outputs["margin"],
            outputs["best_prompt"],
            self.bound,
            noise_level,
            final,
        )

    def check(self) -> None:
        """Raise ModelError where the network does not run, or its scores are not the policy's.

        A size that the file states is run only where it is no more than one run of small images;
        beyond that the policy alone is looked at, and the first image says whether it runs.
        """
        sides = self.metadata["height"] or 32, self.metadata["width"] or 32
        if sides[0] * sides[1] > RUN_CELLS:
            verdicts = self._decide(self._any_scores())
        else:
            shape = (1, self.metadata["channels"], *sides)
            array = np.random.default_rng(0).standard_normal(shape, np.float32)
            try:
                verdicts = self._decide(self._run(array))
            except Exception as error:
                raise ModelError(f"{self.path}: does not run: {reason(error)}") from error
        # A threshold that lacks a calibration is an error of that noise level, not of the file.
        if len(verdicts) != 1 or not verdicts[0].concepts:
            raise ModelError(f"{self.path}: does not fit its policy: {verdicts[0].error}")

    def _any_scores(self) -> Outputs:
        """Scores of one image as a network of this policy would give them."""
        counts = [len(rule.prompts) for rule in self.bound.rules.concepts]
        first = np.cumsum([0, *counts[:-1]])[None]
        return {
            "probability": np.full(first.shape, 0.5, np.float32),
            "margin": np.zeros(first.shape, np.float32),
            "best_prompt": first,
        }


def _model(metadata: dict[str, Any]) -> ModelId:
    return ModelId(metadata["model"]["name"], metadata["model"]["sha256"])


def _bound(artifact: Artifact) -> BoundRules:
    """The file's policy for its model's scores. Raises ModelError where the two do not fit."""
    metadata = artifact.metadata
    try:
        rules = Rules.of(metadata["policy"])
        if list(metadata["prompts"]) != list(rules.prompts):
            raise ValueError("its prompts are not those of the policy")
        bound = rules.bind(
            _model(metadata),
            metadata["space"],
            metadata["logit_scale"],
            covered=metadata["covered"],
            seen=metadata["seen"],
        )
        for k, rule in enumerate(rules.concepts):
            if rule.threshold.kind == "fpr" and bound.covered[k]:
                bound.calibration(k)  # without any, no image could ever be judged
        return bound
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{artifact.path}: does not fit its policy: {kind}{error}") from error
