"""Teach a concept from drawings, calibrate it, guard a pipeline with it, and export it.

    python examples/teach.py

nano has no word for a cigarette: its text side knows ImageNet's classes. Here it learns
cigarette-like things from 50 drawings (examples/drawings.py), and nothing has to be downloaded. The
latents are a stand-in for SDXL's: the linear view that nano reads is exact in them, which it is not
for a real picture. With pictures of your own give them to `latentguard concept learn` with
`--autoencoder`, and the rest is as here.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from drawings import cigarettes, others
from rich.console import Console
from rich.table import Table

from latentguard import LatentGuard
from latentguard.evaluate.exact import exact_sdxl_pipeline, outcome, prompt
from latentguard.files import save_latents
from latentguard.runtime import Guard
from latentguard.spaces import Latents

POLICY = """\
schema_version: 1
name: no-smoking
version: "1"
concepts:
  - id: cigarettes
    category: tobacco
    description: Cigarette-like things, learned from drawings.
    examples: cigarette.safetensors
    threshold: {fpr: 0.02}
    noise_window: [0, 0.5]
    action: block
"""

PROMPTS = ("cigarette-001", "ball-002", "cigarette-002", "pencil-000")


def run(*command: object) -> None:
    """Show a command, and run it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    code = "import sys; from latentguard.cli import main; sys.exit(main())"
    # An exit code of 1 says that something was blocked, 2 and more that something is wrong.
    ended = subprocess.run([sys.executable, "-c", code, *words[1:]], check=False).returncode
    if ended > 1:
        sys.exit(ended)


def main() -> None:
    """All of it, in one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("teach"), help="a folder for the files")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    # What is learned from, what thresholds are set by, and what none of both has seen.
    sets = {
        "cigarettes": cigarettes(50),
        "others": others(200, seed=10_000),
        "harmless": others(300, seed=20_000),
        "new-cigarettes": cigarettes(20, seed=30_000),
        "new-others": others(80, seed=40_000),
    }
    files = {name: out / f"{name}.safetensors" for name in sets}
    for name, latents in sets.items():
        save_latents(files[name], latents)
    concept, policy, exported = (
        out / name for name in ("cigarette.safetensors", "no-smoking.yaml", "no-smoking.onnx")
    )
    model = ("--model", "nano-sdxl")

    given = ("--positives", files["cigarettes"], "--negatives", files["others"])
    run("latentguard", "concept", "learn", "cigarette", *given, *model, "-o", concept)
    given = ("--positives", files["new-cigarettes"], "--negatives", files["new-others"])
    run("latentguard", "concept", "test", concept, *given, *model)

    policy.write_text(POLICY)
    levels = ("--noise-levels", "0,0.5", "--estimate", "wiener")
    run("latentguard", "calibrate", files["harmless"], "--policy", policy, *model, *levels)
    run("latentguard", "scan", files["new-cigarettes"], "--policy", policy, *model)

    print("\nA pipeline of diffusers, guarded:")
    test = [sets["new-cigarettes"][:8], sets["new-others"][:8]]
    ids = [name for latents in test for name in latents.ids or ()]
    photos = Latents(torch.cat([latents.tensor for latents in test]), "sdxl", True, ids=ids)
    guard = generate(photos, policy, options.steps)
    guard.plot(out / "guard.png")

    size = ("--height", "64", "--width", "64", "--check", files["new-cigarettes"])
    run("latentguard", "export", "onnx", "--policy", policy, *model, *size, "-o", exported)
    with Guard(exported) as runtime:
        print("\nWithout torch, the exported file says:")
        for verdict in runtime.scan(photos.tensor[[0, 8]].numpy()):
            print(f"  {verdict.reason}")
    print(f"\nAll files are in {out}/; guard.png has the scores while the noise goes.")


def generate(photos: Latents, policy: Path, steps: int) -> LatentGuard:
    """Generate some of the drawings, guarded, and say what came out."""
    pipe = exact_sdxl_pipeline(photos, labels=photos.ids)
    pipe.set_progress_bar_config(disable=True)
    # The small VAE is not SDXL's, so the space has to be named.
    guard = LatentGuard(policy, "nano-sdxl", space="sdxl")
    pipe.callback_on_step_end = guard
    made = pipe(
        **prompt(pipe, list(PROMPTS)),
        height=512,
        width=512,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    became = outcome(pipe, made).labels
    table = Table("asked for", "decision", "why", "came out", box=None)
    for asked, verdict, label in zip(PROMPTS, guard.verdicts, became, strict=True):
        (score,) = verdict.concepts
        why = f"'{score.prompt}' with margin {score.margin:.3f} of {score.threshold_value:.3f}"
        name = "nothing" if verdict.decision == "block" else label
        table.add_row(asked, verdict.decision, why, name)
    Console().print(table)
    return guard


if __name__ == "__main__":
    main()
