"""Every pipeline class of the installed diffusers, each made of parts without weights, and what a
guard says when it is attached. `python tests/guard/every_pipeline.py` writes docs/pipelines.md."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.pipelines
import guard_pipelines as small
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from guard_helpers import LinearEncoder, policy

from latentguard import LatentGuard, LatentSpace
from latentguard.encoders.catalog import CATALOG
from latentguard.errors import LatentGuardError, LatentsError
from latentguard.guard.attachment import check_pipeline
from latentguard.guard.layout import check_readable, space_of
from latentguard.guard.numbers import Numbers
from latentguard.guard.output import check_images

OWN = "own"
"""How the names of spaces begin that only these tests know."""
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


# -- the classes -------------------------------------------------------------------------------


@functools.cache
def every_class() -> dict[str, type]:
    """By name; the modules that need packages which are not installed are left out."""
    path = diffusers.pipelines.__path__
    for module in pkgutil.walk_packages(path, "diffusers.pipelines."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
    found = {
        cls.__name__: cls
        for cls in _subclasses(DiffusionPipeline)
        if cls.__module__.startswith("diffusers.pipelines.")
    }
    return dict(sorted(found.items()))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


# -- their parts -------------------------------------------------------------------------------


def _flux_vae(channels: int = 16, scale: float = 0.3611, shift: float | None = 0.1159) -> Any:
    return small.autoencoder(
        channels, scale, shift, use_quant_conv=False, use_post_quant_conv=False
    )


def _flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, latent_channels=32
    ).eval()
    generator = torch.Generator().manual_seed(5)
    vae.bn.running_mean.copy_(torch.randn(128, generator=generator) * 0.1)
    vae.bn.running_var.copy_(torch.rand(128, generator=generator) + 0.5)
    return vae


def _deep_vae() -> Any:
    blocks: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        blocks |= {
            f"{side}_block_types": "ResBlock",
            f"{side}_block_out_channels": (8, 8, 8, 8, 8, 32),
            f"{side}_layers_per_block": (1,) * 6,
            f"{side}_qkv_multiscales": ((),) * 6,
        }
    return diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=8, scaling_factor=0.41407, **blocks
    ).eval()


def _wan_vae(channels: int = 16) -> Any:
    if channels == 16:
        return diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval()
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        num_res_blocks=1,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=WAN22_MEAN,
        latents_std=WAN22_STD,
    ).eval()


def _hunyuan_image_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(32, 32, 32, 32, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64,
        scaling_factor=0.75289,
    ).eval()


# The published numbers of Wan 2.2's VAE, which Bria's FIBO has too.
WAN22_MEAN = [
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542),
    *(0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109),
    *(0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899),
    *(-0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
]
WAN22_STD = [
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344),
    *(0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804),
    *(0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999),
    *(0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
]


@functools.cache
def vae(kind: str) -> Any:
    """A VAE of a few kilobytes with the config of a published one."""
    torch.manual_seed(0)
    make: dict[str, Callable[[], Any]] = {
        "sd1": lambda: small.autoencoder(4, 0.18215),
        "sdxl": lambda: small.autoencoder(4, 0.13025),
        "sd3": lambda: _flux_vae(16, 1.5305, 0.0609),
        "flux1": _flux_vae,
        "flux2": _flux2_vae,
        "cogview": lambda: _flux_vae(16, 1.0, None),
        "glm": lambda: small.autoencoder(
            16, 1.0, latents_mean=[0.1 * i for i in range(16)], latents_std=[1.5] * 16
        ),
        "qwen": lambda: diffusers.AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1).eval(),
        "qwen21": lambda: diffusers.AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, num_res_blocks=1
        ).eval(),
        "wan21": _wan_vae,
        "wan22": lambda: _wan_vae(48),
        "sana": _deep_vae,
        "hunyuan-image": _hunyuan_image_vae,
        "movq": lambda: diffusers.VQModel(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ).eval(),
    }
    return make[kind]()


# The VAE of the published weights of a pipeline; the first pattern that matches counts.
PUBLISHED = (
    (r"StableDiffusionXL|Kolors|HunyuanDiT|AuraFlow|LuminaPipeline|OmniGen|BriaPipeline", "sdxl"),
    (r"LEditsPPPipelineStableDiffusionXL|PixArtSigma|AnimateDiffSDXL", "sdxl"),
    (r"StableDiffusion3", "sd3"),
    (r"Flux2|BriaFibo2|ErnieImage|Ideogram4", "flux2"),
    (r"Flux|Chroma|ZImage|Ovis|HiDream|Lumina2|VisualCloze|LongCatImage", "flux1"),
    (r"Kandinsky5.2I|PRX", "flux1"),
    (r"CogView", "cogview"),
    (r"GlmImage", "glm"),
    (r"QwenImage21", "qwen21"),
    (r"QwenImage|Krea2|NucleusMoE", "qwen"),
    (r"BriaFibo", "wan22"),
    (r"JoyImage|Cosmos2TextToImage", "wan21"),
    (r"HunyuanImage", "hunyuan-image"),
    (r"Sana(?!Video|ImageToVideo|WM)", "sana"),
    (r"Kandinsky(3|V22)", "movq"),
    (r"", "sd1"),
)


def published(cls: type) -> str:
    return next(kind for pattern, kind in PUBLISHED if re.match(pattern, cls.__name__))


def stub(kind: type, **config: Any) -> Any:
    """A part of a class with the config of its defaults, and no weights but one.

    A denoiser among them predicts something smooth of its input, of that form and of as many
    channels as `config["predicts"]` says, where they are others; a ControlNet predicts nothing.
    """
    return type(kind.__name__, (_Stub, kind), {"__module__": kind.__module__})(kind, config)


class _Stub(torch.nn.Module):
    def __init__(self, kind: type, config: dict[str, Any]) -> None:
        torch.nn.Module.__init__(self)
        parameters = inspect.signature(kind.__init__).parameters.values()
        known = {p.name: p.default for p in parameters if p.default is not p.empty}
        if known.get("sample_size", 64) is None:
            known["sample_size"] = 64
        if known.get("control_in_dim", 33) is None:
            known["control_in_dim"] = 33  # of the ControlNet that Z-Image's inpainting takes
        self._internal_dict = FrozenDict({**known, **config})
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.transformer_blocks = self.single_transformer_blocks = torch.nn.ModuleList()
        vars(self).update(dict.fromkeys(_SHARED))
        self.in_channels = self._internal_dict.get("in_channels")
        self.head_dim, self.inner_dim, self.num_heads, self.max_seq = 8, 16, 2, 4096

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (
            "ControlNet" in type(self).__name__
            and "controlnet_cond" in kwargs
            and ("UNet" not in type(self).__name__)
        ):
            return [], None
        names = ("hidden_states", "sample", "image_latent", "x")
        given = [kwargs[name] for name in names if name in kwargs] or list(args)
        x = given[0]
        if isinstance(x, list):  # of images, each with those that it is made from before it
            own = [one[-1] if isinstance(one, list) else one for one in x]
            return Transformer2DModelOutput(sample=[self._predicted(one) for one in own])
        return Transformer2DModelOutput(sample=self._predicted(x))

    def _predicted(self, x: torch.Tensor) -> torch.Tensor:
        y = 0.5 * x.float() + 0.1 * torch.tanh(x.float().roll(1, -1))
        y = y.to(x.dtype)
        axis = self.config.get("axis", 1)
        channels = self.config.get("predicts", y.shape[axis])
        while y.shape[axis] < channels:
            y = torch.cat([y, y], axis)
        return y.narrow(axis, 0, channels)


# Attributes that pipelines ask their parts for, and go on without.
_SHARED = (
    *("t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder"),
    *("noise_refiner", "context_refiner", "x_pad_token", "cap_pad_token", "input_hint_block"),
)


class _Processor:
    """What QwenImage21Pipeline asks when it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def made(cls: type, **given: Any) -> Any:
    """A pipeline of a class, its VAE that of the published weights, some parts given."""
    hints, parts = _hints(cls), dict(given)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in ("self", *parts) or variadic:
            continue
        kinds = [option for option in _options(hints.get(name)) if inspect.isclass(option)]
        if name in ("vae", "movq"):
            parts[name] = vae(published(cls))
        elif name == "scheduler":
            parts[name] = _scheduler(cls, kinds)
        elif name == "requires_safety_checker":
            parts[name] = False
        elif name in ("safety_checker", "feature_extractor", "image_encoder"):
            parts[name] = None
        elif models := [k for k in kinds if issubclass(k, torch.nn.Module) and _own(k)]:
            parts[name] = stub(models[-1 if name == "unet" else 0])
        elif name == "processor" and cls.__name__ == "QwenImage21Pipeline":
            parts[name] = _Processor()
        elif parameter.default is parameter.empty:
            parts[name] = None
    pipe: Any = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _own(kind: type) -> bool:
    return kind.__module__.startswith("diffusers.")


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)
    except Exception:  # names that only type checkers import
        parameters = inspect.signature(cls.__init__).parameters
        return {name: parameter.annotation for name, parameter in parameters.items()}


def _options(hint: Any) -> list[Any]:
    arguments = typing.get_args(hint)
    return [one for a in arguments for one in _options(a)] if arguments else [hint]


def _scheduler(cls: type, kinds: list[Any]) -> Any:
    if cls.__name__.startswith("SanaSprint"):
        return diffusers.SCMScheduler()
    named = [kind for kind in kinds if hasattr(kind, "step") and not inspect.isabstract(kind)]
    if named and named[0].__name__ not in ("SchedulerMixin",):
        return named[0]()
    return diffusers.EulerDiscreteScheduler(**small.BETAS)


# -- what a guard says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table.

    state: "bundled" with a model that comes along, "own" with one of the user's own, "refused".
    space: that of the pipeline's published VAE; empty where nobody asks. said: the sentence of a
        refusal.
    """

    name: str
    family: str
    decoder: str
    state: str
    space: str
    said: str = ""


def own_space(pipe: Any) -> LatentSpace:
    """The space that the owner of a VAE would declare, which is none of the known ones."""
    part = decoder(pipe)
    config = part.config
    channels = config.get("latent_channels") or config.get("z_dim")
    numbers = Numbers.of(config)
    scale: Any = 1.0
    shift: Any = 0.0
    if type(part).__name__ != "VQModel" and numbers is not None:  # whose factor nothing reads
        factor = 1.0 if numbers.factor is None else numbers.factor
        if numbers.mean is None or numbers.std is None:
            scale, shift = factor, numbers.shift or 0.0
        else:
            scale, shift = tuple((factor / numbers.std).tolist()), tuple(numbers.mean.tolist())
    return LatentSpace(
        name=f"{OWN}-{published(type(pipe))}",
        channels=channels,
        scale=scale,
        shift=shift,
        vae_scale_factor=factor_of(part),
    )


def factor_of(part: Any) -> int:
    """Pixels along the side of a latent cell."""
    config = part.config
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if name in config:
            return int(config[name])
    if "temperal_downsample" in config:
        return int(2 ** len(config["temperal_downsample"]))
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def decoder(pipe: Any) -> Any:
    return getattr(pipe, "vae", None) or getattr(pipe, "movq", None)


def guard_for(pipe: Any, **more: Any) -> tuple[LatentGuard, LatentSpace]:
    """A guard with an encoder of the pipeline's space, or of the owner's own where it has none."""
    try:
        space, given = space_of(pipe), None
    except LatentsError:
        if decoder(pipe) is None:
            raise
        given = space = own_space(pipe)
    rules = more.pop("policy", None) or policy(action="observe")
    encoder = more.pop("encoder", LinearEncoder)(space.name, space.channels)
    return LatentGuard(rules, encoder, space=given, **more), space


def row_of(cls: type) -> Row:
    """What happens when a guard is attached to a pipeline of a class."""
    family = cls.__module__.removeprefix("diffusers.pipelines.").split(".")
    named = "deprecated" if family[0] == "deprecated" else family[0]
    hints = [k.__name__ for k in _options(_hints(cls).get("vae")) if inspect.isclass(k)]
    part = " or ".join(sorted(name for name in hints if name != "NoneType"))
    try:
        _ask_class(cls)
        pipe = made(cls)
        guard, space = guard_for(pipe)
        pipe.callback_on_step_end = guard
    except LatentGuardError as error:
        return Row(cls.__name__, named, part, "refused", "", str(error))
    bundled = {entry.space for entry in CATALOG.values() if entry.bundled}
    state = "bundled" if space.name in bundled else "own"
    return Row(cls.__name__, named, part, state, space.name)


def _ask_class(cls: type) -> None:
    """Raise what a guard says without asking more than the class, some of which take parts that are
    not to be had here."""
    pipe: Any = object.__new__(cls)
    vars(pipe).update(vae=vae("sd1"), _internal_dict={})
    for check in (check_pipeline, check_images, check_readable):
        check(pipe)


@functools.cache
def every_row() -> tuple[Row, ...]:
    return tuple(row_of(cls) for cls in every_class().values())


# -- the page ----------------------------------------------------------------------------------

_STATES = {"bundled": "bundled model", "own": "own model", "refused": "refused"}
_REASONS = (
    (r"has no callback_on_step_end", "no step callback"),
    (r"has no latents in its step callback", "no latents in its step callback"),
    (r"returns .* and no images", "returns no images"),
    (r"the noise levels of (\w+) are not known", r"the noise levels of \1 are not known"),
    (r"has no VAE that tells its latent space", "no VAE that tells its latent space"),
    (r"^\w+ (denoises .*?|orders .*?|rescales .*?), and no step", r"\1"),
)


def shortly(sentence: str) -> str:
    """A refusal in a few words."""
    for pattern, words in _REASONS:
        if (found := re.search(pattern, sentence)) is not None:
            return found.expand(words)
    raise ValueError(f"a refusal that the page has no words for: {sentence}")


def page(rows: tuple[Row, ...]) -> str:
    """docs/pipelines.md."""
    count = {state: sum(row.state == state for row in rows) for state in _STATES}
    lines = [
        "# Pipelines",
        "",
        f"What a guard does on each of the {len(rows)} pipeline classes of diffusers "
        f"{diffusers.__version__}. This page is generated by `make pipelines`; a test compares it "
        "with what happens.",
        "",
        f"- **bundled model** ({count['bundled']}): `pipe.callback_on_step_end = "
        'LatentGuard("default")` is all that it takes.',
        f"- **own model** ({count['own']}): the latents are read rightly, and no model for them "
        "comes with the package. Give one: `LatentGuard(policy, model=...)`, and "
        "`space=LatentSpace(...)` too where the table says that the space is your own.",
        f"- **refused** ({count['refused']}): attaching a guard raises `GuardError`, which says "
        "why. A pipeline that returns no images, such as one for videos, can still be scored: use "
        '`output_type="latent"` and `Scorer`.',
        "",
        "The space is that of the weights that the pipeline was published with. A pipeline that "
        "you load with another VAE has the space of that VAE.",
        "",
        "| class | family | VAE | state | space, or why not |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        space = "your own" if row.space.startswith(OWN) else row.space
        told = shortly(row.said) if row.state == "refused" else space
        cells = (row.name, row.family, row.decoder or "none", _STATES[row.state], told)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(every_row()), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
