"""Short runs of the pipelines of every_pipeline.py: configs of their denoisers, arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import every_pipeline
import guard_pipelines as small
import torch
from diffusers import CogVideoXDDIMScheduler, ControlNetUnionModel
from every_pipeline import decoder, every_class, factor_of, made, published, stub
from PIL import Image

ROWS, COLUMNS = 8, 16
"""Latent cells of the images."""
CHANNELS = {"sd1": 4, "sdxl": 4, "movq": 4, "flux2": 128, "wan22": 48, "sana": 32, "qwen21": 64}


@dataclass(frozen=True)
class Run:
    """How a pipeline is made and called.

    config: of its denoiser, beside the defaults of its class. call: arguments beside those that
        every pipeline gets under the same name; None leaves one out. patch: what takes the place of
        functions that need a text encoder.
    """

    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[Any], None] = lambda pipe: None
    parts: dict[str, Any] = field(default_factory=dict)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _mask(length: int = 5) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.long)


def _unet_xl(pipe: Any) -> None:
    """The size of SDXL's micro-conditioning."""
    linear = SimpleNamespace(in_features=64)
    for name in ("add_embedding", "base_add_embedding"):
        vars(pipe.unet)[name] = SimpleNamespace(linear_1=linear)


def _returns(name: str, value: Any) -> Callable[[Any], None]:
    def patch(pipe: Any) -> None:
        setattr(pipe, name, lambda *_, **__: value)

    return patch


def _ideogram(pipe: Any) -> None:
    def encode_prompt(grid_h: int, grid_w: int, max_sequence_length: int, **_: Any) -> Any:
        count = max_sequence_length + grid_h * grid_w
        zeros = torch.zeros(1, count)
        return torch.zeros(1, count, 8), torch.zeros(1, count, 3), zeros, zeros

    pipe.encode_prompt = encode_prompt


def _omnigen(pipe: Any) -> None:
    """Without its processor of prompts."""
    ids = torch.zeros(2, 3)
    data: dict[str, Any] = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), ids)
    data |= {"input_pixel_values": [], "input_image_sizes": {}}

    class Processor:
        max_image_size = 1024

        def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
            return data

    pipe.multimodal_processor = Processor()


def _hidream(pipe: Any) -> None:
    pipe.default_sample_size = 12


def _kandinsky5(pipe: Any) -> None:
    pipe.resolutions = [(8 * COLUMNS, 8 * ROWS)]


def _kolors(pipe: Any) -> None:
    _unet_xl(pipe)
    zeros, pooled = torch.zeros(1, 5, 16), torch.zeros(1, 16)
    pipe.encode_prompt = lambda *_, **__: (_noise(1, 5, 16), zeros, _noise(1, 16), pooled)


_TEXT_ONLY = {"image": None}
_ONE_NEGATIVE = {"negative_prompt": None}
_PACKED = {"axis": 2, "predicts": 64}
_XL = Run({"addition_time_embed_dim": 8}, patch=_unet_xl)
_QWEN = Run({"in_channels": 64, "guidance_embeds": False}, {"true_cfg_scale": 1.0})
_EDIT = Run(
    {"in_channels": 64, "guidance_embeds": False, "axis": 1},
    {"true_cfg_scale": 1.0, "image": Image.new("RGB", (128, 64), "gray")},
)
_FIBO = Run(
    {"in_channels": 48, "num_layers": 1, "num_single_layers": 1},
    {"prompt": "x", "guidance_scale": 1.0, "image": None},
    _returns("encode_prompt", (_noise(1, 5, 16), None, torch.zeros(5, 3), _mask(), None, [], None)),
)
_SANA = Run({"in_channels": 32}, {**_ONE_NEGATIVE, "use_resolution_binning": False})
_KANDINSKY = Run(
    {"predicts": 8},
    {
        "image_embeds": _noise(1, 8),
        "negative_image_embeds": torch.zeros(1, 8),
        "image": Image.new("RGB", (128, 64), "gray"),
        "mask_image": torch.ones(64, 128).numpy(),
    },
)

# The first pattern that matches counts.
RUNS: tuple[tuple[str, Run], ...] = (
    (r"KolorsImg2Img", Run({"addition_time_embed_dim": 8}, patch=_kolors)),
    (
        r"StableDiffusionXLControlNetUnion",
        Run(
            {"addition_time_embed_dim": 8},
            {"control_mode": [0]},
            _unet_xl,
            {"controlnet": stub(ControlNetUnionModel, num_control_type=6)},
        ),
    ),
    (r"StableDiffusionXL|Kolors", _XL),
    (
        r"StableDiffusionDepth2Img",
        Run({"in_channels": 5, "predicts": 4}, {"depth_map": torch.rand(1, 64, 128)}),
    ),
    (r"StableDiffusionInstructPix2Pix", Run({"in_channels": 8, "predicts": 4})),
    (r"LatentConsistency", Run({"time_cond_proj_dim": 8})),
    (r"BriaFibo2", Run({"in_channels": 32}, _TEXT_ONLY)),
    (
        r"BriaFiboEdit",
        replace(
            _FIBO,
            call={
                **_FIBO.call,
                "prompt": '{"edit_instruction": "x"}',
                "image": Image.new("RGB", (256, 128), "gray"),
                "_auto_resize": False,
            },
        ),
    ),
    (r"BriaFibo", _FIBO),
    (r"BriaPipeline", Run({"in_channels": 16})),
    (
        r"CogView3Plus",
        Run(
            {"in_channels": 16},
            parts={
                "scheduler": CogVideoXDDIMScheduler(
                    **small.BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"
                )
            },
        ),
    ),
    (r"CogView4Control", Run({"in_channels": 32, "predicts": 16})),
    (
        r"ErnieImage",
        Run(
            {"text_in_dim": 16},
            {"prompt_embeds": [_noise(5, 16)], "negative_prompt_embeds": [_noise(5, 16)]},
        ),
    ),
    (r"Flux2(Klein)?(KV)?Pipeline", Run(call=_TEXT_ONLY)),
    (r"FluxControl(Img2Img|Inpaint|Pipeline)", Run({"in_channels": 128, **_PACKED})),
    (r"FluxFill", Run({"in_channels": 384, **_PACKED})),
    (r"FluxKontext", Run(call={"_auto_resize": False, "max_area": 64 * 128})),
    (
        r"GlmImage",
        Run(
            {"in_channels": 16, "patch_size": 2, "num_layers": 1},
            {"prior_token_ids": torch.zeros(1, 6, dtype=torch.long), "image": None},
        ),
    ),
    (
        r"HiDream",
        Run(
            {"in_channels": 16, "max_resolution": (ROWS, COLUMNS)},
            {
                "prompt_embeds_t5": _noise(1, 5, 16),
                "negative_prompt_embeds_t5": torch.zeros(1, 5, 16),
                "prompt_embeds_llama3": _noise(2, 1, 5, 16),
                "negative_prompt_embeds_llama3": torch.zeros(2, 1, 5, 16),
            },
            _hidream,
        ),
    ),
    (
        r"HunyuanDiT",
        Run(
            {"predicts": 8, "patch_size": 2},
            {
                "prompt_embeds_2": _noise(1, 5, 16),
                "negative_prompt_embeds_2": torch.zeros(1, 5, 16),
                "prompt_attention_mask_2": _mask(),
                "negative_prompt_attention_mask_2": _mask(),
                "use_resolution_binning": False,
            },
        ),
    ),
    (
        r"HunyuanImage",
        Run(
            {"in_channels": 64},
            {
                "prompt_embeds_2": _noise(1, 5, 16),
                "prompt_embeds_mask_2": _mask(),
                "negative_prompt_embeds_2": torch.zeros(1, 5, 16),
                "negative_prompt_embeds_mask_2": _mask(),
            },
        ),
    ),
    (
        r"Ideogram4",
        Run(
            {"in_channels": 128},
            {
                "prompt": "x",
                "max_sequence_length": 4,
                "guidance_scale": 2.0,
                "guidance_schedule": None,
            },
            _ideogram,
        ),
    ),
    (
        r"Kandinsky5",
        Run(
            {"in_visual_dim": 16},
            {
                "prompt_embeds_qwen": _noise(1, 5, 16),
                "prompt_embeds_clip": _noise(1, 16),
                "negative_prompt_embeds_qwen": torch.zeros(1, 5, 16),
                "negative_prompt_embeds_clip": torch.zeros(1, 16),
                "prompt_cu_seqlens": torch.tensor([0, 5]),
                "negative_prompt_cu_seqlens": torch.tensor([0, 5]),
            },
            _kandinsky5,
        ),
    ),
    (
        r"Kandinsky3",
        Run(
            {"in_channels": 4},
            {
                "attention_mask": _mask(),
                "negative_attention_mask": _mask(),
                "image": Image.new("RGB", (128, 64), "gray"),
            },
        ),
    ),
    (r"KandinskyV22", _KANDINSKY),
    (
        r"Krea2",
        Run(
            {"in_channels": 64},
            {
                "prompt_embeds": _noise(1, 5, 2, 16),
                "negative_prompt_embeds": torch.zeros(1, 5, 2, 16),
                "guidance_scale": 1.0,
            },
        ),
    ),
    (r"LuminaPipeline", Run({"in_channels": 4, "predicts": 8}, {"scaling_watershed": 0.0})),
    (r"NucleusMoE", Run({"in_channels": 64})),
    (r"OmniGen", Run({"in_channels": 4}, {"prompt": ["x"]}, _omnigen)),
    (r"Ovis", Run({"in_channels": 64}, _ONE_NEGATIVE)),
    (r"PRX", Run({"in_channels": 16}, {"use_resolution_binning": False})),
    (r"QwenImage21", Run({"in_channels": 64}, {**_TEXT_ONLY, "use_kv_cache": False})),
    (r"QwenImageEdit", _EDIT),
    (r"QwenImage", _QWEN),
    (
        r"SanaSprint",
        Run(
            {"in_channels": 32, "guidance_embeds": True},
            {"num_inference_steps": 2, "use_resolution_binning": False},
        ),
    ),
    (r"Sana", _SANA),
    (r"ZImageOmni", Run({"in_channels": 16}, _TEXT_ONLY)),
    (
        r"ZImage",
        Run(
            {"in_channels": 16},
            {"prompt_embeds": [_noise(5, 16)], "negative_prompt_embeds": [_noise(5, 16)]},
        ),
    ),
    (r"", Run()),
)


NEEDS_MORE = {
    "LEditsPPPipelineStableDiffusion": "an inverted image, and so a tokenizer and a text encoder",
    "LEditsPPPipelineStableDiffusionXL": "an inverted image, and so tokenizers and text encoders",
}
"""Pipelines that are not run here, and what they would take."""


def run_of(cls: type) -> Run:
    return next(run for pattern, run in RUNS if re.match(pattern, cls.__name__))


def pipeline(cls: type) -> Any:
    """A pipeline that runs."""
    run, hints, parts = run_of(cls), every_pipeline._hints(cls), {}
    for name in ("transformer", "unet", "unconditional_transformer"):
        options = every_pipeline._options(hints.get(name))
        kinds = [k for k in options if inspect.isclass(k) and issubclass(k, torch.nn.Module)]
        if kinds:
            packed = re.match(r"Flux(?!2)|Chroma", cls.__name__)
            channels = 64 if packed else CHANNELS.get(published(cls), 16)
            config = {"in_channels": channels, "guidance_embeds": False, **run.config}
            parts[name] = stub(kinds[-1] if name == "unet" else kinds[0], **config)
    pipe = made(cls, **parts, **run.parts)
    run.patch(pipe)
    return pipe


def arguments(cls: type, pipe: Any, **more: Any) -> dict[str, Any]:
    """Three steps from prompt embeddings, with the same noise each time."""
    factor = factor_of(decoder(pipe))
    height, width = ROWS * factor, COLUMNS * factor
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    shared = {
        "prompt_embeds": _noise(1, 5, 16),
        "negative_prompt_embeds": torch.zeros(1, 5, 16),
        "pooled_prompt_embeds": _noise(1, 16),
        "negative_pooled_prompt_embeds": torch.zeros(1, 16),
        "prompt_embeds_mask": _mask(),
        "negative_prompt_embeds_mask": _mask(),
        "prompt_attention_mask": _mask(),
        "negative_prompt_attention_mask": _mask(),
        "height": height,
        "width": width,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
        "image": picture,
        "control_image": picture,
        "mask_image": mask,
        "control_mask": mask,
        "strength": 0.9,
        "pag_scale": 0.0,
    }
    known = inspect.signature(inspect.unwrap(cls.__call__)).parameters
    given = {name: value for name, value in shared.items() if name in known}
    own = {name: value for name, value in run_of(cls).call.items() if name in known}
    return {**given, **own, **more}


def class_of(name: str) -> type:
    return every_class()[name]
