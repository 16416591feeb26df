"""`latentguard evaluate generated`, which is also `evaluate zeroshot --generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.bar import Bar
from latentguard.cli.evaluate import (
    BatchSize,
    Names,
    TemplateOption,
    TemplatesOption,
    evaluate_app,
    templates_of,
)
from latentguard.cli.generating import Generation, generating

if TYPE_CHECKING:
    from latentguard.encoders import Encoder
    from latentguard.evaluate.generate.generators import Generator
    from latentguard.evaluate.generate.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the command to those of `evaluate`."""
    evaluate_app.command("generated", no_args_is_help=True)(generated_)


@dataclass(frozen=True, kw_only=True)
class _OfLatents(Generation):
    """A pipeline is called for its latents."""

    def _of_diffusers(self, settings: Settings) -> Generator:
        from latentguard.evaluate.generated.pipeline import LatentsGenerator

        return LatentsGenerator(settings)

    def encoders(self, names: list[str]) -> list[Encoder]:
        """Encoders of the generator's latents, each once, where the generator runs.

        Raises UsageError, before anything is generated, for an encoder of another latent space.
        """
        from latentguard.errors import UsageError
        from latentguard.evaluate.zeroshot import encoder_for
        from latentguard.guard.layout import space_of

        pipe = self.generator.pipe
        space = space_of(pipe, self.generator.space).name
        found = [encoder_for(name, space, str(pipe._execution_device)) for name in names]
        for encoder in found:
            if encoder.space != space:
                raise UsageError(
                    f"{encoder.name} reads {encoder.space} latents, and the generator makes "
                    f"latents of {space}"
                )
        return list({encoder.name: encoder for encoder in found}.values())


@generating(gives=_OfLatents)
def generated_(
    given: _OfLatents,
    names: Names,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="An encoder to measure. May be repeated. Default: the one of --model."),
    ] = None,
    template: TemplateOption = None,
    templates: TemplatesOption = None,
    prompt_template: Annotated[
        str,
        typer.Option(help="The prompt that images are generated with; {} is the class name."),
    ] = "a photo of a {}.",
    images: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of images to generate for each class.")
    ] = 10,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the others count up from it.")
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Generate images of only this many classes, from the first. They are still "
            "compared with all names.",
        ),
    ] = None,
    batch_size: BatchSize = 16,
) -> None:
    """Generate images of class names, and measure zero-shot accuracy on their final latents.

    Nothing is decoded. The pictures in the run's folder are linear views of the latents.

    Example: latentguard evaluate zeroshot --generate stabilityai/sdxl-turbo --names
    imagenet_class_index.json --run runs/generated --steps 1 --guidance 0 --model latent-clip-b8
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate.classes import read_classes
    from latentguard.evaluate.generated import asked_of, measure_arm, report

    if "sld" in given.arm:
        raise UsageError(
            "the arm sld returns only pictures, but this command measures final latents"
        )
    classes = read_classes(names)
    texts = templates_of(template, templates)
    asked = asked_of(classes.names[:limit], images, seed, prompt_template)
    encoders = given.encoders(encoder or [given.model])
    taken = {
        "prompt_template": prompt_template,
        "classes": len(classes),
        "names_sha256": classes.sha256,
        "limit": limit,
        "images": images,
        "seed": seed,
    }
    folder = given.folder("generated", taken, asked)
    given.make(folder, asked)
    measured = {}
    for arm in given.names:
        records = [folder.record(arm, one) or {} for one in asked]
        files = [
            None if record["blocked"] else folder.latents(arm, one)
            for one, record in zip(asked, records, strict=True)
        ]
        with Bar("encoding") as advance:
            measured[arm] = [
                measure_arm(
                    files, [one.row for one in asked], classes.names, one, texts, batch_size,
                    advance,
                )
                for one in encoders
            ]  # fmt: skip
    given.show(report(folder, classes.names, texts, prompt_template, asked, measured))
