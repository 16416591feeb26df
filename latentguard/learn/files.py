"""What was learned, into files that may hold other models' entries already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import UsageError
from latentguard.policy.examples import ConceptFile, Learned, load_concept, write_concept


def check_ending(path: Path) -> None:
    """Raises UsageError for a name that would say that the file is of another kind."""
    if path.suffix != ".safetensors":
        raise UsageError(f"-o {path}: a concept's file ends in .safetensors")


def entries_there(path: Path, name: str) -> tuple[Learned, ...]:
    """What a concept's file holds already, nothing where there is none.

    Raises UsageError where it could not be this concept's, PolicyError where it is none.
    """
    check_ending(path)
    if not path.exists():
        return ()
    there = load_concept(path)
    if there.name != name:
        raise UsageError(f"{path} is of concept '{there.name}', not '{name}': give another -o")
    return there.entries


def put(path: Path, name: str, learned: Learned) -> tuple[ConceptFile, bool]:
    """Write an entry, beside those of other models where the file is there already.

    Returns the file, and whether an entry of this model was replaced.
    Raises UsageError and PolicyError as `entries_there` does.
    """
    others = entries_there(path, name)
    kept = [entry for entry in others if entry.key != learned.key]
    return write_concept(path, name, [*kept, learned]), len(kept) < len(others)


def common_name(concepts: Sequence[ConceptFile], name: str | None) -> str:
    """The name of a merged file. Raises UsageError for one file, or names that differ."""
    if len(concepts) < 2:
        raise UsageError("merging needs two files or more")
    names = list(dict.fromkeys(concept.name for concept in concepts))
    if name is None and len(names) > 1:
        raise UsageError(f"the files are of {' and '.join(names)}: say which name to give (--name)")
    return name or names[0]
