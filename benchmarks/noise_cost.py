"""What an iteration of `optimize_noise` is made of: rewards on latents beside rewards on pixels.

    python benchmarks/noise_cost.py            # 10 GB of memory, some minutes a round
    python benchmarks/noise_cost.py --rounds 1

The real search runs through StableDiffusionXLPipeline, one step at 512 px (latents of 64 x 64
cells), without guidance, from prompt embeddings. All weights are random, which changes no cost.

- Generator: a U-Net of SDXL's own layout, with three tenths of its channels, so that one core
  can run it.
- Decoder: SDXL's own shape (49.5 M parameters).
- Rewards: Latent-CLIP B/8 and B/4-plus, nano-view; CLIP ViT-B/16 at 224 px behind the decoder.

Clocks hang on the search itself: where the U-Net begins, where the reward begins and ends, and
where the gradient reaches pixels and latents. They count the seconds of this process on its one
core, so that others on the machine do not add to them. The rewards take turns, and medians are
told. Beside the seconds stand the FLOPs of each part, counted by torch, and those of SDXL's full
U-Net, which needs no weights to be counted. Results go to benchmarks/results/noise_cost.*
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from guard import sdxl_layout
from machine import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentguard import Latents, load_encoder, optimize_noise
from latentguard.encoders import Encoder
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.evaluate.generate.decoding import VaeDecoder
from latentguard.evaluate.generate.pixel_encoder import PixelEncoder
from latentguard.spaces import SPACES

RESULTS = Path(__file__).parent / "results"
PIXELS = 512
CELLS = PIXELS // 8
CLIP = "ViT-B-16"
PIXEL = "CLIP ViT-B/16 on pixels"
PARTS = (
    "generator forward",
    "decoder forward",
    "model forward",
    "model backward",
    "decoder backward",
    "generator backward",
)
SMALL = ((96, 192, 384), (3, 3, 6))
WHOLE = ((320, 640, 1280), (5, 10, 20))
"""Channels and heads at the three levels."""
PAPER_SHARE = 0.21
PAPER_SAVED = 11.59 - 9.11
PAPER_ITERATIONS = 50


def pipeline() -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.13025,
            sample_size=1024,
        )
        unet = sdxl_layout(*SMALL)
    pipe = StableDiffusionXLPipeline(
        vae=filled(vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=filled(unet),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def filled(module: Any) -> Any:
    """Small random weights; norms as they begin."""
    module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            for parameter in part.parameters(recurse=False):
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
                parameter.normal_(0, scale, generator=generator)
            if "Norm" in type(part).__name__:
                part.weight.fill_(1)
    return module


def pixel_encoder(pipe: Any, folder: Path) -> PixelEncoder:
    """The CLIP as `evaluate reno` loads it, from a file of random weights."""
    torch.manual_seed(0)
    weights = folder / "clip.pt"
    torch.save(open_clip.create_model(CLIP, pretrained=None).state_dict(), weights)
    return PixelEncoder(CLIP, str(weights), VaeDecoder(pipe), SPACES["sdxl"])


def lighten(pipe: Any, encoders: dict[str, Encoder]) -> None:
    """Without what no iteration uses: the text sides, and the VAE's encoder."""
    pipe.vae.encoder = None
    for encoder in encoders.values():
        if isinstance(encoder, LatentCLIP):
            encoder._text_weights.clear()
        if isinstance(encoder, PixelEncoder):
            encoder._clip.transformer = encoder._clip.token_embedding = None


class Clocked:
    """Agreement with a fixed text as a reward, which notes when its parts begin and end.

    marks: of each iteration, the times by name; the U-Net's hook adds `unet`.
    """

    def __init__(self, pipe: Any, encoder: Encoder) -> None:
        self.marks: list[dict[str, float]] = []
        self._encoder = encoder
        self._text = torch.nn.functional.normalize(torch.randn(encoder.dim), dim=0)
        self._hook = pipe.unet.register_forward_pre_hook(self._unet_begins)
        self._pixels = isinstance(encoder, PixelEncoder)
        if isinstance(encoder, PixelEncoder):
            decode = encoder._decode
            self._restore = lambda: setattr(encoder, "_decode", decode)
            encoder._decode = lambda latents: self._decoded(decode(latents))
        else:
            self._restore = lambda: None

    def __call__(self, latents: Latents) -> Tensor:
        self._note("reward")
        self._watch(latents.tensor, "gradient at latents")
        value = self._encoder.encode_latents(latents) @ self._text
        self._note("end")
        return self._encoder.logit_scale * value

    def close(self) -> None:
        self._hook.remove()
        self._restore()

    def iterations(self) -> list[dict[str, float]]:
        """Seconds of each part, of each iteration that has all of them."""
        found = []
        for now, after in pairwise(self.marks):
            if "gradient at latents" not in now:
                continue
            decoded = now.get("decoded", now["reward"])
            pixels = now.get("gradient at pixels", now["gradient at latents"])
            ends = (
                now["unet"], now["reward"], decoded, now["end"], pixels,
                now["gradient at latents"], after["unet"],
            )  # fmt: skip
            parts = [later - before for before, later in pairwise(ends)]
            found.append(dict(zip(PARTS, parts, strict=True)))
        return found

    def _unet_begins(self, *_: Any) -> None:
        self.marks.append({})
        self._note("unet")

    def _decoded(self, pixels: Tensor) -> Tensor:
        self._note("decoded")
        self._watch(pixels, "gradient at pixels")
        return pixels

    def _watch(self, tensor: Tensor, name: str) -> None:
        marks = self.marks[-1]
        if tensor.requires_grad:
            tensor.register_hook(lambda _: marks.__setitem__(name, time.process_time()))

    def _note(self, name: str) -> None:
        self.marks[-1][name] = time.process_time()


def search(pipe: Any, encoder: Encoder) -> tuple[list[dict[str, float]], float]:
    """One iteration of the search: seconds by part, and the most memory that it added, GB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    clocked = Clocked(pipe, encoder)
    try:
        optimize_noise(
            pipe,
            None,
            None,
            clocked,
            iterations=1,
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=1,
            guidance_scale=0.0,
            prompt_embeds=torch.randn(1, 77, 2048),
            pooled_prompt_embeds=torch.randn(1, 1280),
        )
    finally:
        clocked.close()
    return clocked.iterations(), memory("VmHWM") - before


def memory(name: str) -> float:
    """GB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e9


def flops(run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """Of a part forward, and backward to its input alone, as weights are frozen."""
    x = x.requires_grad_(True)
    counts = []
    with sdpa_kernel(SDPBackend.MATH):  # whose products torch counts on every device
        with FlopCounterMode(display=False) as counter:
            y = run(x)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.float().sum(), x)
        counts.append(counter.get_total_flops())
    return {"forward": counts[0] / 1e12, "backward": counts[1] / 1e12}


def counted(encoders: dict[str, Encoder]) -> dict[str, dict[str, float]]:
    """Tera-FLOPs of the parts; U-Nets and decoder on no device at all."""
    found = {
        "U-Net measured here": flops_of_unet(sdxl_layout, SMALL),
        "SDXL's U-Net": flops_of_unet(sdxl_layout, WHOLE),
    }
    for name, encoder in encoders.items():
        if isinstance(encoder, PixelEncoder):
            found |= flops_of_pixels(name, encoder)
        else:
            found[name] = flops_of_latents(encoder)
    return found


def flops_of_unet(make: Callable[..., Any], size: tuple[Any, Any]) -> dict[str, float]:
    with torch.device("meta"):
        unet = make(*size).eval().requires_grad_(False)
        added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
        text, step = torch.randn(1, 77, 2048), torch.tensor(999)
        latents = torch.randn(1, 4, CELLS, CELLS)

    def run(x: Tensor) -> Tensor:
        predicted: Tensor = unet(x, step, text, added_cond_kwargs=added).sample
        return predicted

    return {**flops(run, latents), "parameters": sum(p.numel() for p in unet.parameters())}


def flops_of_latents(encoder: Encoder) -> dict[str, float]:
    return flops(lambda x: encoder.features(x).pooled, torch.randn(1, 4, CELLS, CELLS))


def flops_of_pixels(name: str, encoder: PixelEncoder) -> dict[str, dict[str, float]]:
    vae = deepcopy(encoder._decode._vae).to("meta")
    latents = torch.randn(1, 4, CELLS, CELLS, device="meta")
    image, side = encoder._clip.visual, encoder._side
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    return {
        "decoder": {
            **flops(lambda x: vae.decode(x).sample, latents),
            "parameters": sum(p.numel() for p in decoder),
        },
        name: {
            **flops(image, torch.randn(1, 3, side, side)),
            "parameters": sum(p.numel() for p in image.parameters()),
        },
    }


def share(measured: dict[str, Any], name: str) -> float:
    """Of an iteration with the reward on pixels, what one with this reward leaves out."""
    return 1 - measured[name]["iteration"] / measured[PIXEL]["iteration"]


def page(results: dict[str, Any]) -> str:
    measured, tera = results["seconds"], results["tera_flops"]
    m = results["machine"]
    count = results["rounds"]
    rounds = "one round" if count == 1 else f"medians of {count} rounds"
    lines = [
        f"One image of 512 px, one step, float32, {m['cpu']}, torch {m['torch']}; {rounds} in "
        "which the rewards took turns. Seconds are of the process on one core. The machine's load "
        f"was {min(results['load']):.1f} to {max(results['load']):.1f}, of which this process "
        "makes 1: what is above shares caches and memory, and lengthens these seconds, too.",
        "",
        "Seconds an iteration:",
        "",
        "| reward | " + " | ".join(PARTS) + " | iteration | memory above the weights, GB |",
        "| --- " * (len(PARTS) + 3) + "|",
    ]
    for name, one in measured.items():
        cells = [f"{one[part]:.2f}" if one[part] > 0.0005 else "" for part in PARTS]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {one['iteration']:.2f} | "
            f"{one['peak_gb']:.1f} |"
        )
    lines += [
        "",
        "Tera-FLOPs of the parts, forward and backward to the noise:",
        "",
        "| part | parameters, million | forward | backward |",
        "| --- | --- | --- | --- |",
    ]
    for name, one in tera.items():
        parameters = f"{one['parameters'] / 1e6:,.0f}" if "parameters" in one else ""
        lines.append(f"| {name} | {parameters} | {one['forward']:.3f} | {one['backward']:.3f} |")
    lines += ["", *conclusion(results)]
    return "\n".join(lines) + "\n"


def conclusion(results: dict[str, Any]) -> list[str]:
    """What of an iteration the reward's side is, by seconds and by FLOPs."""
    lines = [
        "What a reward on latents leaves out of an iteration with CLIP on pixels: measured with "
        "the smaller U-Net, and by FLOPs with SDXL's own.",
        "",
        "| reward | measured | by FLOPs with SDXL's U-Net |",
        "| --- | --- | --- |",
    ]
    for name, one in results["left_out"].items():
        lines.append(f"| {name} | {one['seconds']:.0%} | {one['flops']:.0%} |")
    each = PAPER_SAVED / PAPER_ITERATIONS
    lines += [
        f"| the paper, on its GPU | {PAPER_SHARE:.0%} | |",
        "",
        f"The paper's {PAPER_SAVED:.2f} seconds in {PAPER_ITERATIONS} iterations are {each:.3f} "
        "seconds an iteration for decoder and CLIP, forward and backward.",
    ]
    return lines


def left_out(measured: dict[str, Any], tera: dict[str, Any]) -> dict[str, dict[str, float]]:
    def both(name: str) -> float:
        return float(tera[name]["forward"] + tera[name]["backward"])

    whole = both("SDXL's U-Net") + both("decoder") + both(PIXEL)
    return {
        name: {
            "seconds": share(measured, name),
            "flops": (both("decoder") + both(PIXEL) - both(name)) / whole,
        }
        for name in measured
        if name != PIXEL
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        encoders: dict[str, Encoder] = {
            "nano-view": load_encoder("nano-view", "cpu", "sdxl"),
            "Latent-CLIP B/8": LatentCLIP.random("latent-clip-b8"),
            "Latent-CLIP B/4-plus": LatentCLIP.random("latent-clip-b4-plus"),
            PIXEL: pixel_encoder(pipe, Path(folder)),
        }
    lighten(pipe, encoders)
    tera = counted(encoders)
    load = [os.getloadavg()[0]]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in encoders}
    peaks = dict.fromkeys(encoders, 0.0)
    for number in range(arguments.rounds):
        for name, encoder in encoders.items():
            found, peak = search(pipe, encoder)
            runs[name] += found
            peaks[name] = max(peaks[name], peak)
            print(number, name, found, f"{peak:.1f} GB", flush=True)
        load.append(os.getloadavg()[0])
        write(results_of(runs, peaks, load, tera))


def results_of(
    runs: dict[str, list[dict[str, float]]],
    peaks: dict[str, float],
    load: list[float],
    tera: dict[str, dict[str, float]],
) -> dict[str, Any]:
    measured = {}
    for name, some in runs.items():
        measured[name] = {part: statistics.median(one[part] for one in some) for part in PARTS}
        measured[name]["iteration"] = statistics.median(sum(one.values()) for one in some)
        measured[name]["peak_gb"] = peaks[name]
    return {
        "machine": machine(),
        "rounds": len(load) - 1,
        "load": load,
        "seconds": measured,
        "tera_flops": tera,
        "left_out": left_out(measured, tera),
        "runs": runs,
    }


def write(results: dict[str, Any]) -> None:
    """After each round, so that a run that is cut short has what it measured."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "noise_cost.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "noise_cost.md").write_text(page(results))
    print(page(results), flush=True)


if __name__ == "__main__":
    main()
