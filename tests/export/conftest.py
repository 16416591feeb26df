"""Exports that the tests of this room share: tracing a model is what takes the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from export_helpers import DEEP_B4, SMALL_B4, SMALL_B8, sdxl
from exported import photos

from latentguard.encoders import Encoder, load_encoder
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.export import Exported, export_onnx


@pytest.fixture(scope="session", autouse=True)
def traced(traced_once: None) -> None:
    """In this room, always."""


@pytest.fixture(scope="session")
def models() -> dict[str, Encoder]:
    """The bundled encoders, and small Latent-CLIPs with random weights."""
    return {
        "nano-flux2": load_encoder("nano-flux2", "cpu"),
        "nano-sdxl": load_encoder("nano-sdxl", "cpu"),
        "b8": LatentCLIP.random(SMALL_B8),
        "b4": LatentCLIP.random(SMALL_B4),
        "b4-merging": LatentCLIP.random(DEEP_B4, merge=0.5),
    }


@pytest.fixture(scope="session")
def exports(
    models: dict[str, Encoder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Exported]:
    """Exports under the family policy by name, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("exports")
    nano: dict[str, Any] = {"size": (32, 32), "heatmaps": True}
    # The tests compare on more latents; "nano-int8" is the one whose own comparison is read.
    few: dict[str, Any] = {**nano, "check": photos()[:2]}
    clip: dict[str, Any] = {"size": (64, 64)}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "nano": ("nano-flux2", few),
        "nano-fp16": ("nano-flux2", {**few, "precision": "fp16"}),
        "nano-int8": ("nano-flux2", {**nano, "precision": "int8", "calibrate": photos()}),
        "nano-dynamic": ("nano-flux2", {**few, "precision": "int8-dynamic"}),
        "nano-sdxl": ("nano-sdxl", {"size": (64, 64), "check": sdxl(2, (64, 64))}),
        "clip": ("b8", clip),
        "clip-raw": ("b8", {**clip, "scaled": False}),
        "clip-fp16": ("b8", {**clip, "precision": "fp16"}),
        "clip-int8": ("b8", {**clip, "precision": "int8", "calibrate": sdxl(16, (64, 64))}),
        "clip-dynamic": ("b8", {**clip, "precision": "int8-dynamic"}),
        "clip-open": ("b4", {"heatmaps": True}),
        "merging": ("b4-merging", {**clip, "heatmaps": True}),
        "merging-fp16": ("b4-merging", {**clip, "precision": "fp16"}),
        "merging-int8": (
            "b4-merging",
            {**clip, "precision": "int8", "calibrate": sdxl(16, (64, 64))},
        ),
        "merging-dynamic": ("b4-merging", {**clip, "precision": "int8-dynamic"}),
    }
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            model, options = ways[name]
            made[name] = export_onnx("family", models[model], folder / f"{name}.onnx", **options)
        return made[name]

    return get
