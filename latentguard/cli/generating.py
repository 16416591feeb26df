"""What all commands that generate images share: their options, and what these do.

`@generating` adds the options to those of a command, which receives them as one `Generation`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from latentguard.cli.bar import Bar
from latentguard.cli.evaluate import Print

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from latentguard.evaluate.generate.arms import Arm
    from latentguard.evaluate.generate.asked import Asked
    from latentguard.evaluate.generate.folder import RunFolder
    from latentguard.evaluate.generate.generators import Generator
    from latentguard.evaluate.generate.judging import Judge, Judgment
    from latentguard.evaluate.generate.settings import Settings

Run = Annotated[
    Path, typer.Option(help="Folder for the images and results of this run. See --resume.")
]
Resume = Annotated[
    bool,
    typer.Option(help="Continue the run in that folder. Finished images are not made again."),
]
Kind = Annotated[
    Literal["diffusers", "exact"],
    typer.Option(
        "--generator",
        help="What makes the images. diffusers: the pipeline that --pipeline names. exact: the "
        "exact generator over --latents, which needs no weights.",
    ),
]
Pipeline = Annotated[
    str | None,
    typer.Option(help="A folder with a diffusers pipeline, or its name on the Hugging Face hub."),
]
Config = Annotated[
    Path | None,
    typer.Option(help="A YAML file with the pipeline's settings. Options override it."),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Type of the pipeline's weights."),
]
Variant = Annotated[
    str | None, typer.Option(help="Variant of the pipeline's weight files, such as fp16.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Device that the pipeline and the judges run on, such as cpu or cuda:0."),
]
Offload = Annotated[
    Literal["none", "model", "sequential"] | None,
    typer.Option(help="Keep weights in the host's memory until they are needed on the GPU."),
]
Scheduler = Annotated[
    str | None, typer.Option(help="A scheduler class of diffusers, instead of the pipeline's own.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Number of denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. Default: the benchmark's own.")
]
Height = Annotated[
    int | None, typer.Option(min=8, help="Image height in pixels. Default: the benchmark's own.")
]
Width = Annotated[
    int | None, typer.Option(min=8, help="Image width in pixels. Default: the benchmark's own.")
]
Latents = Annotated[
    Path | None, typer.Option(help="With --generator exact: the latents that it can generate.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="With --generator exact: a file with the class of each of --latents, one per line. "
        "Default: their ids."
    ),
]
Loop = Annotated[
    Literal["sdxl", "flux2"],
    typer.Option(help="With --generator exact: the pipeline whose denoising loop it runs in."),
]
Leak = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="With --generator exact: about the chance that a prompt gives another class.",
    ),
]
ArmNames = Annotated[
    list[str],
    typer.Option(
        "--arm",
        help="What is compared: none (no guard), block or steer (a guard), noise or reno (a "
        "search of the initial noise), sld (safe latent diffusion). May be repeated.",
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        help="For the arms block, steer and noise: the name of a shipped policy, or a YAML file."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="The encoder that the arms judge with. For the arm noise it may also be "
        "pixel:ARCHITECTURE:WEIGHTS, a CLIP model of open_clip on decoded pictures."
    ),
]
Rewards = Annotated[
    list[str],
    typer.Option(
        "--reward",
        help="For the arm reno: latent:MODEL, or pixel:ARCHITECTURE:WEIGHTS for a CLIP model of "
        "open_clip on decoded pictures. May be repeated; each reward is an arm of its own.",
    ),
]
Iterations = Annotated[
    int, typer.Option(min=0, help="Iterations of the search in the arms noise and reno.")
]
Sld = Annotated[
    Literal["weak", "medium", "strong", "max"],
    typer.Option(help="Which of the published settings the arm sld uses."),
]
JudgeModel = Annotated[str, typer.Option(help="The encoder that a judge policy:NAME judges with.")]
JudgeAutoencoder = Annotated[
    Path | None,
    typer.Option(help="An autoencoder that encodes the pictures for a judge policy:NAME."),
]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The options of a run. Each field is an option, and its annotation is the text of `--help`."""

    run: Run
    arm: ArmNames
    policy: PolicyName
    reward: Rewards
    model: Model = "auto"
    iterations: Iterations = 50
    sld: Sld = "strong"
    kind: Kind = "diffusers"
    pipeline: Pipeline = None
    config: Config = None
    dtype: Dtype = None
    variant: Variant = None
    device: Device = None
    offload: Offload = None
    scheduler: Scheduler = None
    steps: Steps = None
    guidance: Guidance = None
    height: Height = None
    width: Width = None
    latents: Latents = None
    labels: Labels = None
    loop: Loop = "sdxl"
    leak: Leak = 0.0
    resume: Resume = False
    output: Print = "table"

    @property
    def where(self) -> str:
        """Where judges run."""
        return self.device or "cpu"

    @cached_property
    def generator(self) -> Generator:
        """What makes the images. Raises UsageError if options do not go together."""
        from latentguard.errors import UsageError
        from latentguard.evaluate.generate.settings import read_settings

        given = {name: getattr(self, name) for name in _SETTINGS}
        if self.kind == "diffusers":
            if self.latents is not None or self.labels is not None:
                raise UsageError("--latents and --labels need --generator exact")
            return self._of_diffusers(read_settings(self.config, given))
        from latentguard.evaluate.generate.exact_generator import ExactGenerator

        given = {name: value for name, value in given.items() if name not in ("steps", "guidance")}
        useless = [name for name, value in given.items() if value is not None]
        if useless or self.config is not None:
            raise UsageError(
                f"--generator exact takes no --{[*useless, 'config'][0]}: it has --latents, "
                "--labels, --loop, --leak, --steps and --guidance"
            )
        if self.latents is None:
            raise UsageError("--generator exact needs --latents, such as examples/latents.pt")
        return ExactGenerator(
            self.latents,
            self.labels,
            loop=self.loop,
            steps=self.steps,
            guidance=self.guidance,
            leak=self.leak,
        )

    def _of_diffusers(self, settings: Settings) -> Generator:
        from latentguard.evaluate.generate.generators import PipelineGenerator

        return PipelineGenerator(settings)

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms that were asked for, each once. Raises UsageError for an unknown one."""
        from latentguard.errors import UsageError

        if bool(self.reward) is not ("reno" in self.arm):
            raise UsageError("the arm reno needs --reward, and only the arm reno uses it")
        found: list[Arm] = []
        for name in dict.fromkeys(self.arm):
            found += self._renos() if name == "reno" else [self._arm(name)]
        return found

    @property
    def names(self) -> list[str]:
        """The arms' names."""
        return [one.name for one in self.arms]

    def _renos(self) -> list[Arm]:
        """One arm for each reward. The models of all rewards measure all of the arms."""
        from latentguard.errors import UsageError
        from latentguard.evaluate.generate.reno import Reno
        from latentguard.evaluate.generate.rewards import arm_name, encoder_named

        named: dict[str, str] = {}
        for reward in dict.fromkeys(self.reward):
            other = named.setdefault(arm_name(reward), reward)
            if other != reward:
                raise UsageError(
                    f"--reward {other} and --reward {reward} would share the folder "
                    f"{arm_name(reward)}: give one of the files another name"
                )
        encoders = {name: encoder_named(name, self.generator) for name in named.values()}
        return [Reno(self.generator, name, encoders, self.iterations) for name in named.values()]

    def _arm(self, name: str) -> Arm:
        from latentguard.errors import UsageError
        from latentguard.evaluate.generate import arms
        from latentguard.policy import load_policy

        if name == "none":
            return arms.Unguarded(self.generator)
        if name == "block":
            return arms.Guarded(self.generator, load_policy(self.policy), "block", self.model)
        if name == "steer":
            return arms.Guarded(self.generator, load_policy(self.policy), "steer", self.model)
        if name == "noise":
            policy = load_policy(self.policy)
            return arms.SearchedNoise(self.generator, policy, self.model, self.iterations)
        if name == "sld":
            return arms.SafeLatentDiffusion(self.generator, self.sld)
        raise UsageError(f"there is no arm {name!r}: use {', '.join(arms.ARMS)}")

    def folder(
        self, benchmark: str, prompts: Mapping[str, Any], asked: Sequence[Asked]
    ) -> RunFolder:
        """The run's folder, new or resumed. prompts: where they come from, for its manifest."""
        from latentguard.evaluate.generate.folder import RunFolder
        from latentguard.evaluate.generate.run import manifest_of

        manifest = manifest_of(benchmark, prompts, asked, self.generator)
        _ = self.arms  # raises for wrong arms before there is a folder
        return RunFolder(self.run, manifest, self.resume)

    def make(self, folder: RunFolder, asked: Sequence[Asked], in_turn: bool = False) -> None:
        """Make the images that do not exist yet; in_turn: see `make_images`."""
        from latentguard.evaluate.generate.run import make_images

        with Bar("generating") as advance:
            make_images(folder, self.arms, asked, advance, in_turn)

    def judge(
        self, folder: RunFolder, judges: Sequence[Judge], asked: Sequence[Asked]
    ) -> dict[tuple[str, str], dict[str, Judgment]]:
        """The judgments of each judge on each arm's images; see `judge_images`."""
        from latentguard.evaluate.generate.judging import judge_images

        with Bar("judging") as advance:
            return judge_images(folder, judges, self.names, asked, advance)

    def show(self, results: Mapping[str, Any]) -> None:
        """Print the results in the form that `--format` names."""
        if self.output == "json":
            typer.echo(json.dumps(results))
        else:
            typer.echo((self.run / "results.md").read_text("utf-8"))


_SETTINGS = (
    "pipeline", "dtype", "variant", "device", "offload", "scheduler", "steps", "guidance", "height",
    "width",
)  # fmt: skip
"""The options that are settings of a pipeline, by the names of `Settings`."""


def generating(
    arm: str = "none", policy: str = "default", gives: type[Generation] = Generation
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of `Generation` to a command. Its first parameter receives them.

    arm, policy: defaults of these options. gives: the class that the command receives.
    """
    defaults: dict[str, Any] = {"arm": [arm], "policy": policy, "reward": []}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Generation, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=hints[field.name],
            )
            for field in fields(Generation)
        ]
        shared[0] = shared[0].replace(default=inspect.Parameter.empty)  # run has none
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        @wraps(command)
        def run(**given: Any) -> None:
            options = {parameter.name: given.pop(parameter.name) for parameter in shared}
            command(gives(**options), **given)

        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        every = [*own, *shared]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in every}
        return run

    return decorate
