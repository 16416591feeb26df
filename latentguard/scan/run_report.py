"""The report of a run: one HTML page of a merged tally, whatever the number of its shards."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from latentguard import __version__
from latentguard.atomic import replacing
from latentguard.scan.parts import Collected
from latentguard.scan.tally import Tally
from latentguard.text import counted, visible


def render(collected: Collected, date: datetime | None = None) -> str:
    """The page, complete: styles and pictures are inside, and it has no script."""
    from latentguard.scan import run_view as view
    from latentguard.scan.axis import BARS
    from latentguard.scan.category_counts import extent
    from latentguard.scan.templating import asset, content_policy, environment

    tally = collected.tally
    judges = view.judge_views(tally)
    return (
        environment()
        .get_template("run.html")
        .render(
            tally=tally,
            policy=tally.policy,
            collected=collected,
            headline=_headline(tally),
            date=date or datetime.now(UTC),
            version=__version__,
            style=asset("report.css") + asset("run.css"),
            content_policy=content_policy(""),
            models=view.models(tally),
            concept_count=view.concept_count(tally),
            judges=judges,
            figure=(4 * BARS, view.HEIGHT),
            units=sorted({c.concept.unit for judge in judges for c in judge.checked}),
            phases=view.phases(tally),
            span=view.span(tally),
            shares=view.share_views(tally),
            percent=view.percent,
            extent=extent,
        )
    )


def write(path: str | Path, collected: Collected) -> None:
    """Write the page to `path`, whole or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(render(collected).encode("utf-8"))


def summary(collected: Collected) -> str:
    """One line: how many images, what became of them, and by which policy."""
    tally = collected.tally
    counts = ", ".join(f"{tally.outcomes[o]:,} {name}" for o, name in _NAMES.items())
    errors = counted(tally.outcomes["error"], "error")
    policy = tally.policy
    by = f" · policy {policy.name} {policy.version} ({policy.sha256[:12]})" if policy else ""
    shards = f" in {counted(collected.shards, 'shard')}" if collected.shards else ""
    return visible(f"{counted(tally.images, 'image')}{shards}: {counts}, {errors}{by}", 2000)


_NAMES = {"allow": "allowed", "review": "review", "block": "blocked"}


def _headline(tally: Tally) -> str:
    flagged = tally.images - tally.outcomes["allow"]
    if tally.images == 0:
        return "Nothing was scanned"
    images = counted(tally.images, "image") + (" looked at" if tally.sample is not None else "")
    return f"{flagged:,} of {images} not allowed" if flagged else f"All of {images} allowed"
