"""LAION's improved aesthetic predictor: five linear layers on an embedding of CLIP ViT-L/14."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.errors import ModelError
from latentguard.evaluate.generate.generators import module_sha256
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.judges.clip import ClipPictures
from latentguard.regular import problem, read_bounded

MAX_BYTES = 64 << 20
HIDDEN = (1024, 128, 64, 16)
LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in its files; between them stand dropouts, and nothing else."""


class Aesthetic:
    """Scores how much people would like a picture, about 1 to 10. Flags nothing.

    predictor: `sac+logos+ava1-l14-linearMSE.pth` of
        github.com/christophschuhmann/improved-aesthetic-predictor, or the same as safetensors;
        nothing is unpickled but tensors. clip: ViT-L/14 with OpenAI's weights.

    Raises ModelError for a file of something else.
    """

    name = "aesthetic"

    def __init__(self, predictor: str | Path, clip: ClipPictures) -> None:
        self._clip = clip
        sizes = (clip.width, *HIDDEN, 1)
        self._net = nn.Sequential(
            *(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        )
        self._net.load_state_dict(_read(Path(predictor), self._net.state_dict()))
        self._sha256 = module_sha256(self._net)
        self._net.eval().to(clip.device)

    def describe(self) -> dict[str, Any]:
        """CLIP and the predictor, by digest."""
        return {
            "judge": self.name,
            "clip": self._clip.name,
            "clip_sha256": self._clip.sha256,
            "weights_sha256": self._sha256,
        }

    @torch.inference_mode()
    def judge(self, picture: Path, latents: Path | None) -> Judgment:
        """The score; higher is better."""
        score = float(self._net(F.normalize(self._clip.embed(picture), dim=-1)))
        return Judgment(False, round(score, 6), f"aesthetic {score:.2f}")


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights under the names of `wanted`, whose shapes they must have."""
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise ModelError(f"{path}: {problem(error)}") from error
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            found = safetensors.torch.load(data)
        else:
            found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        # What torch says of such files advises to unpickle them.
        raise ModelError(
            f"{path}: not the weights of an aesthetic predictor: the file is damaged, or holds "
            "something else than tensors, which is not unpickled"
        ) from error
    names = {
        f"layers.{number}.{part}": f"{place}.{part}"
        for place, number in enumerate(LAYERS)
        for part in ("weight", "bias")
    }
    if not isinstance(found, dict) or set(found) != set(names):
        raise ModelError(
            f"{path}: an aesthetic predictor must have the keys {', '.join(names)} and no others"
        )
    read = {}
    for key, name in names.items():
        value, shape = found[key], wanted[name].shape
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"{path}: {key} must be {list(shape)}, got {got}")
        read[name] = value.float()
        if not bool(torch.isfinite(read[name]).all()):
            raise ModelError(f"{path}: {key} is not finite")
    return read
