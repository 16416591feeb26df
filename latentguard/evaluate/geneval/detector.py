"""The built-in evaluator, not the official one: torchvision's Mask R-CNN, colors by pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.generate.generators import module_sha256
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.geneval.colors import color_of
from latentguard.evaluate.geneval.prompts import parse
from latentguard.evaluate.geneval.rules import SCORE, Detected, check
from latentguard.text import first_line

NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""COCO's names that GenEval has others for."""

SAMPLE = 2000
"""Pixels of an object that are asked for their color."""


class BuiltInEvaluator:
    """Says what is wrong with a picture in GenEval's folders. Not the official evaluator.

    weights: a file of torchvision's maskrcnn_resnet50_fpn_v2 (COCO), or "torchvision", which
        fetches it.
    Raises ModelError where the weights cannot be had.
    """

    name = "geneval-builtin"

    def __init__(self, weights: str | Path = "torchvision", device: str = "cpu") -> None:
        from torchvision.models.detection import (
            MaskRCNN_ResNet50_FPN_V2_Weights,
            maskrcnn_resnet50_fpn_v2,
        )

        published = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1
        try:
            if str(weights) == "torchvision":
                model = maskrcnn_resnet50_fpn_v2(weights=published)
            else:
                model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
                state = torch.load(Path(weights), weights_only=True, map_location="cpu")
                model.load_state_dict(state)
        except Exception as error:  # files, networks, shapes: all kinds
            raise ModelError(
                "the built-in evaluator needs the weights of torchvision's "
                f"maskrcnn_resnet50_fpn_v2, and {str(weights)!r} does not give them "
                f"({first_line(error)}); --evaluator none leaves the images to GenEval's own"
            ) from error
        self._model = model.eval().to(device)
        self._classes = [NAMES.get(name, name) for name in published.meta["categories"]]
        self._sha256 = module_sha256(model)
        self._device = device

    def describe(self) -> dict[str, Any]:
        """The detector, by digest."""
        return {
            "judge": self.name,
            "official": False,
            "detector": "torchvision maskrcnn_resnet50_fpn_v2",
            "weights_sha256": self._sha256,
            "colors": "nearest name in CIELAB of most of the mask's pixels",
        }

    def judge(self, picture: Path, latents: Path | None) -> Judgment:
        """Flags a picture with anything wrong; the prompt is the metadata.jsonl beside it."""
        file = picture.parent.parent / "metadata.jsonl"
        try:
            line = file.read_text("utf-8").strip()
        except OSError as error:
            raise LatentsError(f"{file}: cannot be read: {error.strerror}") from error
        from PIL import Image

        rgb = np.asarray(Image.open(picture).convert("RGB"))
        wrong = check(parse(line, str(file)), self.detect(rgb))
        return Judgment(bool(wrong), float(len(wrong)), "; ".join(wrong) or "right")

    @torch.inference_mode()
    def detect(self, rgb: NDArray[np.uint8]) -> dict[str, list[Detected]]:
        """Everything in a picture [H, W, 3] that is above the lowest score that counts."""
        pixels = torch.from_numpy(rgb.copy()).permute(2, 0, 1).float().div(255).to(self._device)
        (found,) = self._model([pixels])
        objects: dict[str, list[Detected]] = {}
        for label, score, box, mask in zip(
            found["labels"].tolist(),
            found["scores"].tolist(),
            found["boxes"].tolist(),
            found["masks"].cpu(),
            strict=True,
        ):
            if score > SCORE:
                inside = rgb[(mask[0] > 0.5).numpy()]
                some = inside[:: max(1, len(inside) // SAMPLE)]
                one = Detected(tuple(box), score, color_of(some))
                objects.setdefault(self._classes[label], []).append(one)
        return objects
