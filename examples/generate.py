"""A guarded generation that runs anywhere: diffusers' own SDXL loop, no weights to download.

    python examples/generate.py

The pipeline, its scheduler, its guidance and its noise are diffusers'. Where SDXL's UNet would be
stands the exact denoiser of the 25 bundled latents (`latentguard.evaluate.exact`), so each
generation becomes one of these pictures: the one that its prompt names. The guard does not know
that. It scores the predictions as they sharpen, and blocks what its policy forbids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from latentguard import LatentGuard
from latentguard.evaluate.exact import exact_sdxl_pipeline, outcome, prompt
from latentguard.files import load_latents
from latentguard.spaces import Latents

HERE = Path(__file__).parent
PROMPTS = ("cat", "revolver", "pagoda", "beer-glass-pagoda")


def bundled() -> Latents:
    """The bundled latents as one batch."""
    batches = list(load_latents(HERE / "latents.pt"))
    ids = [name for batch in batches for name in batch.ids or ()]
    tensor = torch.cat([batch.tensor for batch in batches]).float()
    return Latents(tensor, "flux2", scaled=True, ids=ids)


def main() -> None:
    """Generate one picture a prompt, and say what the guard did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="ids of bundled pictures")
    parser.add_argument("--policy", default="family", help="a shipped policy, or a file")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps of each picture")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--plot", type=Path, default=Path("guard.png"), help="where scores are drawn over noise"
    )
    options = parser.parse_args()

    latents = bundled()
    pipe = exact_sdxl_pipeline(latents, labels=latents.ids)
    # SDXL's own latents need no `space`: it is found from the VAE.
    guard = LatentGuard(options.policy, space="flux2")
    pipe.callback_on_step_end = guard

    made = pipe(
        **prompt(pipe, list(options.prompts)),
        height=256,
        width=256,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="latent",
    ).images
    became = outcome(pipe, made).labels

    table = Table("asked for", "decision", "why", "noise left", "came out", box=None)
    for index, verdict in enumerate(guard.verdicts):
        top = max((c for c in verdict.concepts if c.covered), key=lambda c: c.probability)
        why = f"{top.id} {top.probability:.3f} of {top.threshold['value']:.3f} by '{top.prompt}'"
        name = "nothing" if verdict.decision == "block" else became[index]
        level = f"{verdict.noise_level:.2f}"
        table.add_row(options.prompts[index], verdict.decision, why, level, name)
    Console().print(table)
    guard.plot(options.plot)
    print(f"wrote {options.plot}: scores against thresholds while the noise goes")


if __name__ == "__main__":
    main()
