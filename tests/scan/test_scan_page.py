"""The report's page as its templates make it: values are text, and pieces come one by one."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from scan_helpers import HOSTILE, write_latents

from latentguard.scan import Report, Scan, Summary
from latentguard.scan import page as page_module

ANY_TEXT = st.text(st.characters(categories=None), max_size=300) | st.sampled_from(HOSTILE)


def filled(template: str, **values: Any) -> str:
    return page_module.environment().from_string(template).render(**values)


@given(ANY_TEXT, ANY_TEXT)
def test_values_are_text_between_tags_and_within_attributes(child: str, attribute: str) -> None:
    made = filled('<p title="{{ a | whole }}" lang="{{ a }}">{{ c }}</p>', a=attribute, c=child)
    inner = made.removeprefix('<p title="').removesuffix("</p>")
    whole, short, content = inner.replace('" lang="', '">', 1).split('">')
    assert not set("<>\"'\n\x00") & {*whole, *short, *content}


def test_text_is_shortened_and_what_a_script_compares_is_not() -> None:
    assert len(filled("{{ text }}", text="a" * 5000)) == 2000
    assert len(filled("{{ text | whole }}", text="a" * 5000)) == 5000


def test_a_template_that_names_what_nobody_gave_it_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        filled("{{ verdicts }}")


def collected(folder: Path, policy: Path, count: int) -> tuple[Report, Scan, Summary]:
    """A report on `count` images with pictures of about 100 kB each."""
    run = Scan(write_latents(folder / "a.pt", count, side=8), policy)
    report, summary = Report(run.rules), Summary(run.policy_id)
    random = np.random.default_rng(0)
    for record in run:
        picture = random.integers(0, 256, (128, 128, 3)).astype(np.uint8)
        object.__setattr__(record, "preview", picture)
        report.add(record)
        summary.add(record)
    return report, run, summary


def test_a_page_is_written_piece_by_piece(tmp_path: Path, calm: Path) -> None:
    report, run, summary = collected(tmp_path, calm, 60)
    report.write(tmp_path / "first.html", run.models, summary)  # compiles the templates
    tracemalloc.start()
    report.write(tmp_path / "report.html", run.models, summary)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "report.html").stat().st_size
    assert size > 3_000_000
    assert most < size / 3


def test_a_page_that_fails_half_way_leaves_the_old_one(
    tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, run, summary = collected(tmp_path, calm, 2)
    target = tmp_path / "report.html"
    target.write_text("old", encoding="utf-8")
    made = page_module.CardView.of
    orders: list[int] = []

    def fail_at_the_second(card: Any, *rest: Any) -> Any:
        orders.append(card.order)
        if len(orders) == 2:
            raise RuntimeError("cannot be drawn")
        return made(card, *rest)

    monkeypatch.setattr(page_module.CardView, "of", fail_at_the_second)
    with pytest.raises(RuntimeError, match="cannot be drawn"):
        report.write(target, run.models, summary)
    assert target.read_text("utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "calm.yaml", "report.html"]


def test_a_page_goes_through_a_pipe(
    tmp_path: Path, calm: Path, pipe: Callable[[Path], Callable[[], bytes]]
) -> None:
    report, run, summary = collected(tmp_path, calm, 1)
    read = pipe(tmp_path / "pipe.html")
    report.write(tmp_path / "pipe.html", run.models, summary)
    assert read().endswith(b"</html>\n")
    assert (tmp_path / "pipe.html").is_fifo()


def test_the_whole_page_and_its_pieces_are_the_same(tmp_path: Path, calm: Path) -> None:
    report, run, summary = collected(tmp_path, calm, 3)
    date = datetime(2026, 1, 2, tzinfo=UTC)
    page = report.render(run.models, summary, date)
    assert page == "".join(page_module.page(report, run.models, summary, date))
    assert page.startswith("<!doctype html>\n<html")
    assert page.count("<article") == 3


def test_what_is_in_a_report_needs_no_templates() -> None:
    code = (
        "import sys, latentguard.scan, latentguard.scan.report_data, latentguard.cli\n"
        "sys.exit('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
