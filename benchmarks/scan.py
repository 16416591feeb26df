"""Time and memory of moderating one latent, against decoding it and asking a pixel network.

Every contender runs in a process of its own (so that its peak memory is its own), the ratios come
from one run of this script. Random weights everywhere but in the nano models: time does not depend
on them. Usage: python benchmarks/scan.py [--batches 1 16] [--repeat 5] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results"
PIXELS = 512
CELLS = PIXELS // 8
# SDXL's VAE needs 20 s an image on two cores; once is enough to divide by.
SLOW = {"sdxl-vae-decode + clip-vit-l-14": 1, "tiny-decode + clip-vit-b-16": 3}


def nano(name: str) -> Callable[[int], Callable[[], Any]]:
    """A bundled model under the family policy: latents to scores."""

    def build(batch: int) -> Callable[[], Any]:
        import torch

        from latentguard import Latents, Scorer

        scorer = Scorer("family", name)
        channels = 32 if scorer.encoder.space == "flux2" else 4
        tensor = torch.randn(batch, channels, CELLS, CELLS)
        latents = Latents(tensor, scorer.encoder.space, scaled=True)
        return lambda: scorer.score(latents)

    return build


def latent_clip(name: str) -> Callable[[int], Callable[[], Any]]:
    """A Latent-CLIP under the family policy: latents to scores."""

    def build(batch: int) -> Callable[[], Any]:
        import torch

        from latentguard import Latents, Scorer
        from latentguard.encoders.latent_clip import LatentCLIP

        scorer = Scorer("family", LatentCLIP.random(name))
        latents = Latents(torch.randn(batch, 4, CELLS, CELLS), "sdxl", scaled=True)
        return lambda: scorer.score(latents)

    return build


def pixel_clip(name: str) -> Any:
    """open_clip's image tower, and the bicubic resize to its input."""
    import open_clip
    import torch.nn.functional as F

    model = open_clip.create_model(name, pretrained=None).visual.eval()

    def embed(images: Any) -> Any:
        return model(F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True))

    return embed


def sdxl_vae(batch: int) -> Callable[[], Any]:
    """What the safety checker of SD costs on SDXL: full VAE decode, then CLIP ViT-L/14."""
    import torch
    from diffusers import AutoencoderKL

    # The published configuration of SDXL's VAE.
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    ).eval()
    clip = pixel_clip("ViT-L-14")
    latents = torch.randn(batch, 4, CELLS, CELLS)
    return lambda: [clip(vae.decode(one[None]).sample) for one in latents]


def tiny_vae(batch: int) -> Callable[[], Any]:
    """The cheap way through pixels: a tiny decoder, then CLIP ViT-B/16."""
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny().eval()
    clip = pixel_clip("ViT-B-16")
    latents = torch.randn(batch, 4, CELLS, CELLS)
    return lambda: clip(vae.decode(latents).sample)


CONTENDERS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "nano-flux2": nano("nano-flux2"),
    "nano-sdxl": nano("nano-sdxl"),
    "latent-clip-b8": latent_clip("latent-clip-b8"),
    "latent-clip-b4-plus": latent_clip("latent-clip-b4-plus"),
    "tiny-decode + clip-vit-b-16": tiny_vae,
    "sdxl-vae-decode + clip-vit-l-14": sdxl_vae,
}


def measure(name: str, batch: int, repeat: int) -> dict[str, Any]:
    """Median seconds an image and peak memory, in this process."""
    import torch

    with torch.inference_mode():
        run = CONTENDERS[name](batch)
        repeat = min(repeat, SLOW.get(name, repeat))
        if name not in SLOW:
            run()
            run()
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) / batch)
    return {
        "name": name,
        "batch": batch,
        "ms": 1e3 * statistics.median(times),
        "fastest_ms": 1e3 * min(times),
        "runs": repeat,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measured_on() -> dict[str, Any]:
    """Where this was measured."""
    import torch

    threads = torch.get_num_threads()
    return machine() | {"threads": threads, "python": platform.python_version()}


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as Markdown, each batch size with its ratios to the full pixel path."""
    lines = [
        f"{PIXELS} px latents, fp32, eager PyTorch. {where['cpu']}, {where['cores']} cores, "
        f"torch {where['torch']}. Medians of one run; ratio = time of SDXL VAE decode + CLIP "
        "ViT-L/14 divided by this one's.",
        "",
        "| what | batch | ms an image | times cheaper | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    base = {row["batch"]: row["ms"] for row in rows if row["name"].startswith("sdxl-vae")}
    for row in rows:
        # The full decoder is timed at batch 1 only when asked for: it does not batch on a CPU.
        full = base.get(row["batch"], base.get(1))
        ratio = f"{full / row['ms']:.0f}" if full else "-"
        cells = (row["name"], row["batch"], f"{row['ms']:.1f}", ratio, f"{row['peak_mb']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--slow-batches", action="store_true", help="the SDXL VAE at every batch")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "BATCH", "REPEAT"), help="internal")
    arguments = parser.parse_args()
    if arguments.child:
        name, batch, repeat = arguments.child
        print(json.dumps(measure(name, int(batch), int(repeat))))
        return
    rows = []
    for batch in arguments.batches:
        for name in arguments.only:
            if name.startswith("sdxl-vae") and batch > 1 and not arguments.slow_batches:
                continue
            print(f"{name}, batch {batch} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--child", name, str(batch), str(arguments.repeat)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    where = measured_on()
    text = table(rows, where)
    print(text)
    if set(arguments.only) == set(CONTENDERS):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "scan.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
        (RESULTS / "scan.md").write_text(text)


if __name__ == "__main__":
    main()
