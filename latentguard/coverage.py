"""Which prompts of a policy a model can see, with numbers, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentguard.errors import CoverageError

if TYPE_CHECKING:
    from latentguard.policy import Policy

_SHOWN = 5


@dataclass(frozen=True)
class Coverage:
    """How much a model sees of each prompt of one concept.

    id: the concept's. prompts, contrast: (text, coverage from 0 to 1), in the policy's order;
    `contrast` has the concept's own prompts, then the policy's.
    needed: the coverage below which a prompt is not visible to the model.
    """

    id: str
    prompts: tuple[tuple[str, float], ...]
    contrast: tuple[tuple[str, float], ...]
    needed: float

    @property
    def seen(self) -> tuple[bool, ...]:
        """Whether the model sees each of the prompts. A coverage of NaN is not seen."""
        return tuple(value >= self.needed for _, value in self.prompts)

    @property
    def unseen(self) -> tuple[tuple[str, float], ...]:
        """The prompts that it does not see."""
        return tuple(pair for pair in self.prompts if not pair[1] >= self.needed)

    @property
    def unseen_contrast(self) -> tuple[tuple[str, float], ...]:
        """The contrast prompts that it does not see; nothing is compared with them."""
        return tuple(pair for pair in self.contrast if not pair[1] >= self.needed)


def check_coverage(policy: Policy, model: str, coverage: Sequence[Coverage]) -> None:
    """Refuse the pair of a policy and a model that cannot see all of its prompts.

    Raises CoverageError where one prompt is not seen and the policy says `uncovered: error`, and,
    whatever it says, where none is seen.
    """
    hidden = [concept for concept in coverage if concept.unseen]
    nothing = not any(any(concept.seen) for concept in coverage)
    if not hidden or not (nothing or policy.uncovered == "error"):
        return
    count = sum(len(concept.unseen) for concept in hidden)
    total = sum(len(concept.prompts) for concept in coverage)
    found = (
        f"policy '{policy.name}': model {model} cannot see {count} of {total} prompts: "
        f"{_listed([_sentence(concept) for concept in hidden], '; ')}; "
        f"coverage {hidden[0].needed:g} is needed"
    )
    errors = [
        f"policy '{policy.name}': model {model} cannot see "
        f"{_sentence(concept, len(concept.unseen))}; coverage {concept.needed:g} is needed"
        for concept in hidden
    ]
    if nothing:
        raise CoverageError(f"{found}. Use another model", errors)
    raise CoverageError(
        f"{found}. Remove or replace these prompts, use another model, or write `uncovered: warn` "
        "in the policy to go on with them marked as not visible",
        errors,
    )


def _sentence(concept: Coverage, limit: int = _SHOWN) -> str:
    texts = [f"'{text}' ({value:.3f})" for text, value in concept.unseen]
    return f"of concept '{concept.id}' {_listed(texts, ', ', limit)}"


def _listed(texts: Sequence[str], between: str, limit: int = _SHOWN) -> str:
    rest = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return between.join(texts[:limit]) + rest
