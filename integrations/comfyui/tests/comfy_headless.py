"""ComfyUI without a server: its own execution engine, on the CPU, with tiny models.

Set LATENTGUARD_COMFYUI to a checkout of it. What it runs is ComfyUI's own: its nodes, samplers,
model classes and files.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1]

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 16,
    "num_heads": 2,
    "num_head_channels": -1,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
"""A UNet of Stable Diffusion 1's form."""

FLOW = {"flux1": "Flux", "flux2": "Flux2", "wan21": "Wan21"}
"""Spaces of models by flow matching, and the names of their latent formats."""


@dataclass
class Ran:
    """What a workflow gave: each node's `ui`, the error that ended it or None, and the latents that
    came to a TestKeep, by its name."""

    ui: dict[str, Any]
    error: dict[str, Any] | None
    kept: dict[str, Tensor]


class Server:
    """What the engine asks of a server."""

    client_id = None
    last_node_id = None

    def send_sync(self, event: str, data: Any, sid: Any = None) -> None:
        pass


class ComfyUI:
    """The engine with the nodes of this folder and some of the tests'."""

    def __init__(self, checkout: str, work: Path) -> None:
        sys.path.insert(0, checkout)
        from comfy.cli_args import args

        args.cpu = True
        os.environ["TQDM_DISABLE"] = "1"
        import execution
        import folder_paths
        import nodes

        self.output = work / "output"
        self.input = work / "input"
        for folder in (self.output, self.input):
            folder.mkdir()
        folder_paths.set_output_directory(str(self.output))
        folder_paths.set_input_directory(str(self.input))
        logging.getLogger().setLevel(logging.WARNING)
        self.nodes = nodes
        self._execution = execution
        extras = Path(checkout) / "comfy_extras"
        asyncio.run(
            self._load(FOLDER, extras / "nodes_custom_sampler.py", extras / "nodes_mask.py")
        )
        self.kept: dict[str, Any] = {}
        self._add_test_nodes()
        # Newer ones must be told how much the cache keeps, as their own server does.
        new = "cache_args" in inspect.signature(execution.PromptExecutor).parameters
        options = {"cache_args": {"lru": 0, "ram": 0.0}} if new else {}
        self._executor = execution.PromptExecutor(Server(), **options)

    async def _load(self, *paths: Path) -> None:
        for path in paths:
            if not await self.nodes.load_custom_node(str(path)):
                raise RuntimeError(f"ComfyUI could not load {path}")

    def run(self, workflow: dict[str, Any]) -> Ran:
        """Validate and execute a workflow in the API's format."""
        self.kept.clear()
        valid, error, outputs, found = asyncio.run(
            self._execution.validate_prompt("test", workflow, None)
        )
        if not valid or found:
            raise AssertionError((error, found))
        self._executor.execute(workflow, "test", {}, outputs)
        ends = [data for name, data in self._executor.status_messages if name == "execution_error"]
        ui = self._executor.history_result["outputs"]
        return Ran(ui, ends[0] if ends else None, dict(self.kept))

    def _add_test_nodes(self) -> None:
        kept = self.kept

        class Node:
            CATEGORY = "test"
            FUNCTION = "run"

        class Picture(Node):
            """A LATENT that the test gives by a key."""

            RETURN_TYPES = ("LATENT",)

            @classmethod
            def INPUT_TYPES(cls) -> Any:  # noqa: N802
                return {"required": {"key": ("STRING", {})}}

            @classmethod
            def IS_CHANGED(cls, key: str) -> float:  # noqa: N802
                return float("nan")

            def run(self, key: str) -> Any:
                return ({"samples": given[key].clone()},)

        class Keep(Node):
            """Keeps whatever comes for the test to look at."""

            RETURN_TYPES = ()
            OUTPUT_NODE = True

            @classmethod
            def INPUT_TYPES(cls) -> Any:  # noqa: N802
                return {"required": {"latent": ("LATENT",), "name": ("STRING", {})}}

            @classmethod
            def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802
                return float("nan")

            def run(self, latent: Any, name: str) -> Any:
                kept[name] = latent["samples"].clone()
                return {}

        class Model(Node):
            """A tiny model of random weights, or one that denoises toward a given picture."""

            RETURN_TYPES = ("MODEL",)

            @classmethod
            def INPUT_TYPES(cls) -> Any:  # noqa: N802
                return {"required": {"kind": ("STRING", {}), "key": ("STRING", {})}}

            def run(self, kind: str, key: str) -> Any:
                return (patcher(kind, given.get(key)),)

        class Text(Node):
            RETURN_TYPES = ("CONDITIONING",)

            @classmethod
            def INPUT_TYPES(cls) -> Any:  # noqa: N802
                return {"required": {"seed": ("INT", {"default": 0})}}

            def run(self, seed: int) -> Any:
                torch.manual_seed(seed)
                return ([[torch.randn(1, 7, 16), {"pooled_output": torch.randn(1, 8)}]],)

        given = self.given = {}
        for node in (Picture, Keep, Model, Text):
            self.nodes.NODE_CLASS_MAPPINGS[f"Test{node.__name__}"] = node


def patcher(kind: str, target: Tensor | None) -> Any:
    """A MODEL of ComfyUI's classes with a space's latents: a small UNet that predicts noise for sd1
    and sdxl, flow matching without a network for the others.

    target: raw latents. With them the network is replaced by the exact denoiser of pictures that
    scatter around the target; without, its weights are random.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    torch.manual_seed(0)
    with torch.inference_mode(False):
        if flow := kind in FLOW:
            config = comfy.supported_models.FluxSchnell({"disable_unet_model_creation": True})
            config.set_inference_dtype(torch.float32, None)
            config.latent_format = getattr(comfy.latent_formats, FLOW[kind])()
            model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW)
        else:
            config = comfy.supported_models.SD15(dict(UNET))
            config.unet_config.update(UNET)
            config.latent_format = {
                "sd1": comfy.latent_formats.SD15,
                "sdxl": comfy.latent_formats.SDXL,
                "unknown": comfy.latent_formats.SC_B,
            }[kind]()
            model = comfy.model_base.BaseModel(config)
            # ComfyUI leaves weights as they come: they are those of a checkpoint that follows.
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.05)
        if target is not None:
            scaled = model.process_latent_in(target)
            model.diffusion_model = Exact(scaled, flow=flow)
        model.eval()
        device = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, device, device)


class Exact(torch.nn.Module):
    """The exact denoiser of pictures that scatter around targets with a deviation of one."""

    dtype = torch.float32

    def __init__(self, target: Tensor, flow: bool) -> None:
        super().__init__()
        self.register_buffer("target", target)
        self.flow = flow

    def forward(self, x: Tensor, timestep: Tensor, **options: Any) -> Tensor:
        sigma = options["transformer_options"]["sigmas"].max()
        target = torch.cat([self.target] * (len(x) // len(self.target))).to(x)
        if self.flow:
            signal = 1 - sigma
            noisy = x
        else:
            signal = torch.ones_like(sigma)
            noisy = x * (sigma**2 + 1).sqrt()
        share = signal / (signal**2 + sigma**2)
        x0 = target + share * (noisy - signal * target)
        return (noisy - x0) / sigma
