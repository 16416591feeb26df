"""`latentguard policy`: list, show and check policies, print their JSON Schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from latentguard.bank import TextSide
    from latentguard.judge import Rules
    from latentguard.policy import Concept, Policy

policy_app = typer.Typer(
    no_args_is_help=True, help="List, show and check policies; print their JSON Schema."
)


def register(app: typer.Typer) -> None:
    app.add_typer(policy_app, name="policy")


@policy_app.command("list")
def list_() -> None:
    """List the shipped policies, as a table on a terminal and as tab-separated lines elsewhere."""
    from latentguard.policy import load_policy, shipped_policies

    policies = [load_policy(path) for path in shipped_policies().values()]
    if not sys.stdout.isatty():
        for policy in policies:
            line = (policy.name, policy.version, str(len(policy.concepts)), _summary(policy))
            typer.echo("\t".join(line))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("policy", "version", "concepts", "what it is for")
    for policy in policies:
        table.add_row(
            f"[bold]{escape(policy.name)}[/bold]",
            escape(policy.version),
            str(len(policy.concepts)),
            escape(_summary(policy)),
        )
    Console().print(table)


@policy_app.command()
def show(
    name: str = typer.Argument(help="The name of a shipped policy, or a YAML file."),
    as_json: bool = typer.Option(False, "--json", help="Print the whole policy as a JSON object."),
    taxonomy: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="Also show which concepts fall under each category of a published hazard scheme "
        "(mlcommons, openai, azure, rekognition). May be repeated.",
        show_default=False,
    ),
) -> None:
    """Show what a policy looks for, at which thresholds, and what it does."""
    from latentguard.policy import load_policy
    from latentguard.text import visible

    policy = load_policy(name)
    if as_json:
        typer.echo(json.dumps(policy.to_dict(), indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Piped output has no width of its own; 80 columns would break every prompt.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"[bold]{escape(policy.name)}[/bold] {escape(policy.version)}")
    if policy.description:
        for line in policy.description.splitlines():
            console.print(escape(visible(line, 4000)))
    console.print(f"sha256 {policy.sha256}", soft_wrap=True)
    for line in _settings(policy):
        console.print(escape(visible(line, 4000)))
    table = Table("concept", "category", "action", "severity", "match from", "prompts")
    for concept in policy.concepts:
        table.add_row(
            escape(concept.id),
            escape(concept.category),
            concept.action,
            concept.severity,
            _threshold(concept),
            escape(visible(", ".join(policy.labels_of(concept)), 4000)),
        )
    console.print(table)
    for scheme in taxonomy:
        _show_taxonomy(console, policy, scheme)


def _show_taxonomy(console: Console, policy: Policy, name: str) -> None:
    """Print the concepts of each category that has some. Raises PolicyError if none has."""
    from rich.markup import escape
    from rich.table import Table

    rules = _mapped(policy, name)
    scheme = rules.scheme(name)
    console.print(escape(f"{scheme.title} {scheme.version}, {scheme.source}"))
    table = Table("category", "name", "concepts")
    for category, concepts in rules.mapped[name].items():
        ids = ", ".join(rule.id for rule in concepts)
        table.add_row(escape(category), escape(scheme.categories[category]), escape(ids))
    console.print(table)
    unmapped = [rule.id for rule in rules.concepts if name not in rule.taxonomy]
    if unmapped:
        console.print(f"in no category of {name}: {escape(', '.join(unmapped))}")


def _mapped(policy: Policy, scheme: str) -> Rules:
    """The rules of a policy that maps concepts to a scheme. Raises PolicyError for any other."""
    from latentguard.errors import PolicyError
    from latentguard.judge import Rules

    rules = Rules.of(policy.to_dict())
    try:
        rules.scheme(scheme)
    except ValueError as error:
        raise PolicyError(str(error)) from error
    return rules


@policy_app.command()
def check(
    files: list[str] = typer.Argument(help="Policy files, or names of shipped policies."),
    model: str | None = typer.Option(
        None,
        help="Also list each prompt that this model cannot see, with its coverage: a name from "
        "`latentguard models list`, or a file.",
    ),
    space: str | None = typer.Option(
        None,
        help="Latent space, if the model reads several (nano-view) and the policies name none: a "
        "name, or a file of your own (.yaml, .json).",
    ),
    taxonomy: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="Also list the concepts that fall under no category of a published hazard scheme. "
        "With --model, list the categories that the model cannot see. May be repeated.",
        show_default=False,
    ),
) -> None:
    """Check policies and print every error of every file, with its line.

    Exit codes: 0 no errors; 2 some errors.
    """
    from latentguard.cli.exit_codes import EXIT_USAGE
    from latentguard.errors import PolicyError
    from latentguard.policy import load_policy
    from latentguard.text import counted, visible

    sees = None if model is None else _text_side(model, space)
    failed = False
    for name in files:
        try:
            policy = load_policy(name)
        except PolicyError as error:
            failed = True
            for sentence in error.errors:
                typer.echo(visible(sentence, 4000), err=True)
            continue
        refused = sees is not None and not _check_seen(name, policy, *sees)
        failed = failed or refused
        if not refused:
            concepts = counted(len(policy.concepts), "concept")
            typer.echo(f"{name}: ok, {concepts}, sha256 {policy.sha256}")
        for scheme in taxonomy:
            try:
                for sentence in _taxonomy_notes(policy, scheme, None if sees is None else sees[0]):
                    typer.echo(visible(f"{name}: note: {sentence}", 4000), err=True)
            except PolicyError as error:
                failed = True
                typer.echo(visible(f"{name}: {error}", 4000), err=True)
        for sentence in _strange_names(policy):
            typer.echo(visible(f"{name}: note: {sentence}", 4000), err=True)
        for concept in policy.concepts:
            if concept.threshold.kind == "fpr" and not _is_calibrated(policy, concept):
                typer.echo(
                    f"{name}: note: '{concept.id}' asks for a false-positive rate of "
                    f"{concept.threshold.value:g}, but no lock file next to the policy has a "
                    "margin for it; the policy cannot judge anything until it is calibrated",
                    err=True,
                )
    if failed:
        raise typer.Exit(EXIT_USAGE)


def _strange_names(policy: Policy) -> Iterator[str]:
    """A space and a model of the policy that nothing here knows. Elsewhere they may be known."""
    from pathlib import Path

    from latentguard.encoders.catalog import known
    from latentguard.spaces.space import guess, known_names

    if policy.space is not None and policy.space not in known_names():
        yield (
            f"space '{policy.space}' is not known here{guess(policy.space)}; one of your own is "
            "given with --space FILE where the policy is used"
        )
    model = (policy.model or "").split("+")[0]
    if model and known(model) is None and not Path(model).is_file():
        yield f"model '{policy.model}' is not known here: see `latentguard models list`"


def _text_side(model: str, space: str | None) -> tuple[TextSide, str]:
    """What knows a model's prompts, and the space that it reads; a packaged model needs no torch.

    Raises ModelError where there is no such model.
    """
    from importlib.util import find_spec

    from latentguard.spaces import LatentSpace

    own = None if space is None else LatentSpace.of(space)
    if find_spec("torch") is None:
        from latentguard.bundled.guard import packaged_text

        return packaged_text(model, own)
    from latentguard.concepts import EncoderText
    from latentguard.encoders import load_encoder

    encoder = load_encoder(model, "cpu", own)
    return EncoderText(encoder), encoder.space


def _taxonomy_notes(policy: Policy, name: str, text: TextSide | None) -> Iterator[str]:
    """What verdicts leave out of a scheme. Raises PolicyError if the policy is not mapped to it."""
    rules = _mapped(policy, name)
    unmapped = [rule.id for rule in rules.concepts if name not in rule.taxonomy]
    if unmapped:
        yield f"in no category of {name}: {', '.join(unmapped)}"
    if text is None:
        return
    from latentguard.bank import coverage_of

    seen = {
        concept.id: any(found.seen)
        for concept, found in zip(policy.concepts, coverage_of(policy, text), strict=True)
    }
    for category, concepts in rules.mapped[name].items():
        if not any(seen[rule.id] for rule in concepts):
            ids = ", ".join(rule.id for rule in concepts)
            yield (f"{text.name} cannot see {name} '{category}', so its score is null ({ids})")


def _check_seen(name: str, policy: Policy, side: TextSide, space: str) -> bool:
    """List the prompts that a model cannot see; return whether it may judge by the policy."""
    from latentguard.bank import coverage_of
    from latentguard.coverage import check_coverage
    from latentguard.errors import CoverageError, ModelError, PolicyError
    from latentguard.policy import lines_of
    from latentguard.text import visible

    if policy.space not in (None, space):
        typer.echo(
            f"{name}: the policy is written for {policy.space} latents, model {side.name} reads "
            f"{space}",
            err=True,
        )
        return False
    try:
        coverage = coverage_of(policy, side)
    except (ModelError, PolicyError) as error:  # of a file of examples
        typer.echo(visible(f"{name}: {error}", 4000), err=True)
        return False
    found: dict[tuple[int | str, ...], str] = {}
    for index, (concept, seen) in enumerate(zip(policy.concepts, coverage, strict=True)):
        for key, pairs in (("prompts", seen.unseen), ("contrast", seen.unseen_contrast)):
            for text, number in pairs:
                place: tuple[int | str, ...] = ("concepts", index, key)
                texts = concept.prompts if key == "prompts" else concept.contrast
                if text not in texts:
                    place, texts = ("contrast",), policy.contrast
                follows = "" if key == "prompts" else "; no image is compared with it"
                found[(*place, texts.index(text))] = (
                    f"'{text}' is not visible to {side.name}: coverage {number:.3f}, "
                    f"{seen.needed:g} is needed{follows}"
                )
    for (file, line), (place, sentence) in zip(
        lines_of(name, list(found)), found.items(), strict=True
    ):
        typer.echo(f"{file}:{line}: {_place(place)} {sentence}", err=True)
    try:
        check_coverage(policy, side.name, coverage)
    except CoverageError as error:
        typer.echo(f"{name}: {error}", err=True)
        return False
    return True


def _place(place: tuple[int | str, ...]) -> str:
    """A place in a policy as messages write it: concepts[0].prompts[1]."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


@policy_app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from latentguard.policy import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _summary(policy: Policy) -> str:
    """The first sentence of its description."""
    from latentguard.text import visible

    text = " ".join(policy.description.split("\n\n")[0].split())
    head, dot, _ = text.partition(". ")
    return visible(head + dot.strip(), 4000)


def _settings(policy: Policy) -> list[str]:
    lines = []
    if policy.model or policy.space:
        written_for = [text for text in (policy.model, policy.space) if text]
        lines.append(f"written for: {', '.join(written_for)}")
    lines.append(f"templates: {' | '.join(policy.templates)}")
    low, high = policy.schedule.noise
    upper = "on" if high is None else f"to {high:g}"
    every = policy.schedule.every
    steps = "each step" if every == 1 else f"one step in {every}"
    lines.append(
        f"scored while denoising: {steps} at noise levels from {low:g} {upper}; "
        "final latents always"
    )
    lines.append(
        f"on_error: {policy.on_error}, on_block: {policy.on_block}, uncovered: {policy.uncovered}"
    )
    if policy.contrast:
        lines.append(f"compared with {len(policy.contrast)} shared contrast prompts")
    schemes = policy.to_dict()["taxonomies"]
    if schemes:
        told = ", ".join(f"{name} {scheme['version']}" for name, scheme in schemes.items())
        lines.append(f"mapped to the taxonomies {told}")
    if policy.lock:
        lines.append(f"lock file: {len(policy.lock.entries)} calibrated entries")
    return lines


def _threshold(concept: Concept) -> str:
    return f"{concept.threshold.kind} {concept.threshold.value:g}"


def _is_calibrated(policy: Policy, concept: Concept) -> bool:
    entries = policy.lock.entries if policy.lock else ()
    return any(entry.concept == concept.id for entry in entries)
