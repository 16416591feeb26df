"""Pictures per second that `latentguard encode` turns into latents, by size, precision and batch.

One thread, and seconds of the processor rather than of the clock, so that other programs on the
machine count less; the contenders take turns. Also what batches and half precision change in the
numbers. Usage: python benchmarks/encode.py PHOTOS --autoencoder taef2_encoder.pth [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

from latentguard.encode import load_autoencoder
from latentguard.encode.folders import find_pictures
from latentguard.encode.framing import Framing
from latentguard.encode.pictures import open_picture

RESULTS = Path(__file__).parent / "results"
SIZES = (256, 512)
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)
PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--autoencoder", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = find_pictures([arguments.photos])[:PICTURES]
    models = {d: load_autoencoder(arguments.autoencoder, device="cpu", dtype=d) for d in DTYPES}
    pixels, decoding = {}, {}
    for size in SIZES:
        begun = time.process_time()
        framed = [Framing(size).apply(open_picture(path))[0] for path in paths]
        decoding[size] = (time.process_time() - begun) / len(paths)
        stacked = torch.stack([torch.from_numpy(one.copy()) for one in framed])
        pixels[size] = stacked.permute(0, 3, 1, 2).float() / 255
    seconds: dict[tuple[int, str, int], list[float]] = {}
    latents: dict[tuple[int, str, int], torch.Tensor] = {}
    for turn in range(arguments.rounds + 1):
        for size in SIZES:
            for dtype in DTYPES:
                for batch in BATCHES:
                    key = size, dtype, batch
                    begun = time.process_time()
                    parts = [models[dtype].encode(one).tensor for one in pixels[size].split(batch)]
                    if turn:  # the first one warms up
                        taken = (time.process_time() - begun) / PICTURES
                        seconds.setdefault(key, []).append(taken)
                    latents[key] = torch.cat(parts)
    rows: list[dict[str, Any]] = []
    for (size, dtype, batch), taken in seconds.items():
        exact = latents[size, "float32", 1]
        rest = latents[size, dtype, batch] - exact
        rows.append(
            {
                "size": size,
                "dtype": dtype,
                "batch": batch,
                "seconds": statistics.median(taken),
                "fastest": min(taken),
                "largest_difference": float(rest.abs().max()),
                "relative_difference": float(rest.square().mean().sqrt() / exact.std()),
            }
        )
    report = {
        "machine": machine(),
        "autoencoder": models["float32"].name,
        "pictures": PICTURES,
        "rounds": arguments.rounds,
        "decoding_seconds": decoding,
        "rows": rows,
    }
    (RESULTS / "encode.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "encode.md").write_text(markdown(report))
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Encoding pictures",
        "",
        f"`python benchmarks/encode.py`: {report['pictures']} photos with {report['autoencoder']}, "
        f"one thread, seconds of the processor, median of {report['rounds']} turns. "
        f"{report['machine']['cpu']}, torch {report['machine']['torch']}.",
        "",
        "Differences are from float32 in batches of one: the largest, and the root mean square as "
        "a share of the latents' deviation.",
        "",
        "| px | precision | batch | ms a picture | pictures a second | largest | relative |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['size']} | {row['dtype']} | {row['batch']} | {1000 * row['seconds']:.0f} | "
            f"{1 / row['seconds']:.1f} | {row['largest_difference']:.1g} | "
            f"{row['relative_difference']:.1g} |"
        )
    lines.append("")
    for size, seconds in report["decoding_seconds"].items():
        lines.append(f"Decoding and scaling one photo to {size} px takes {1000 * seconds:.0f} ms.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
