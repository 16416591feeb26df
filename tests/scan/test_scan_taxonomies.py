"""`latentguard scan --taxonomy`: the same in JSON, CSV, the table and the report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from scan_helpers import ALWAYS, NEVER, write_latents

from latentguard.errors import PolicyError
from latentguard.judge import Rules, Verdict, categorize
from latentguard.policy import load_policy
from latentguard.scan import Report, Scan, Summary
from latentguard.scan.parts import collect, read_records
from latentguard.scan.sinks import read_part
from latentguard.scan.tally import Tally

TEXT = f"""\
schema_version: 1
name: words
version: "1"
uncovered: warn
concepts:
  - id: revolver
    category: weapons
    prompts: [revolver]
    threshold: {{margin: {ALWAYS}}}
    action: observe
    severity: high
    taxonomy: {{azure: [Violence], rekognition: [Weapons]}}
  - id: swastika
    category: hate
    prompts: [a swastika]
    threshold: {{margin: {NEVER}}}
    action: block
    taxonomy: {{azure: [Hate], rekognition: [Nazi Party]}}
"""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    return write_latents(tmp_path / "latents.safetensors", 2)


def test_json_csv_and_the_table(words: Path, latents: Path, tmp_path: Path, command: Any) -> None:
    said = ("scan", latents, "--policy", words, "--model", "nano-flux2", "-q")
    azure = ("--taxonomy", "azure")
    told = command(*said, *azure, "--taxonomy", "rekognition", "--format", "json")
    assert told.code == 0, told.err
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [list(line["taxonomies"]) for line in lines] == [["azure", "rekognition"]] * 2
    found = lines[0]["taxonomies"]["azure"]
    assert found["flagged"] == ["Violence"]
    assert found["scores"]["Hate"] is None
    assert found["severities"] == {"Hate": None, "Violence": 6}
    assert found["unchecked"] == {"Hate": "nano-flux2 cannot see 'swastika'"}
    assert lines[0]["taxonomies"]["rekognition"]["flagged"] == ["Violence", "Weapons"]
    verdict = Verdict.from_dict(lines[0])
    rules = Rules.of(load_policy(words).to_dict())
    assert verdict.taxonomies[0] == categorize(verdict, rules, "azure")

    rows = list(csv.DictReader(io.StringIO(command(*said, *azure, "--format", "csv").out)))
    assert rows[0]["azure"] == "Violence"
    assert rows[0]["azure:Violence"] == f"{found['scores']['Violence']:.6f}"
    assert (rows[0]["azure:Hate"], rows[0]["azure:Hate:severity"]) == ("", "")
    assert rows[0]["azure:Violence:severity"] == "6"
    assert rows[0]["azure:not_checked"] == "Hate: nano-flux2 cannot see 'swastika'"

    page = tmp_path / "report.html"
    table = command(*said, *azure, *azure, "--report", page).out
    assert table.count("azure 2024-09-01, flagged images: Violence 2") == 1
    assert "azure: not checked in 2, as nano-flux2 cannot see 'swastika': Hate" in table
    score = f"{found['scores']['Violence']:.3f}"
    assert f"azure 2024-09-01: Violence {score}, severity 6 · not checked: Hate" in page.read_text()


def test_without_it_records_are_as_ever(words: Path, latents: Path) -> None:
    (record, _) = Scan(latents, words, "nano-flux2")
    assert "taxonomies" not in record.to_dict()


def test_what_cannot_be_read_has_null_scores(words: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npy"
    broken.write_bytes(b"\x93NUMPY")
    run = Scan(broken, words, "nano-flux2", taxonomies=["azure"])
    (record,) = run
    (found,) = record.verdict.taxonomies
    assert record.verdict.decision == "block"
    assert set(found.scores.values()) == {None}
    page = Report(run.rules)
    page.add(record)
    summary = Summary(run.policy_id)
    summary.add(record)
    assert "nothing flagged · not checked: Hate, Violence" in page.render(run.models, summary)


def test_a_scheme_that_the_policy_is_not_mapped_to(
    words: Path, latents: Path, command: Any
) -> None:
    with pytest.raises(PolicyError, match="maps no concept to the taxonomy 'openia'"):
        Scan(latents, words, "nano-flux2", taxonomies=["openia"])
    refused = command(
        "scan", latents, "--policy", words, "--model", "nano-flux2", "--taxonomy", "openai"
    )
    assert refused.code == 2
    assert refused.err == (
        "latentguard: policy 'words' maps no concept to the taxonomy 'openai'; those that it maps "
        "to: azure, rekognition\n"
    )


@pytest.mark.parametrize("sink", ["parquet", "json"])
def test_runs_tell_it_too(
    words: Path, latents: Path, tmp_path: Path, command: Any, sink: str
) -> None:
    if sink == "parquet":
        pytest.importorskip(
            "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
        )
    broken = tmp_path / "broken.npy"
    broken.write_bytes(b"\x93NUMPY")
    schemes = ("azure", "rekognition")
    told = [name for scheme in schemes for name in ("--taxonomy", scheme)]
    given = ("scan", latents, broken, "--policy", words, "--model", "nano-flux2")
    run = ("--run", tmp_path / "run", "--sink", sink, "--workers", 0)
    assert command(*given, *run, *told).code == 3
    (part,) = (tmp_path / "run" / "parts").iterdir()
    plain = [r.to_dict() for r in Scan([latents, broken], words, "nano-flux2", taxonomies=schemes)]
    assert [record.to_dict() for record in read_records(part)] == plain
    assert read_part(part) == plain

    page = tmp_path / "page.html"
    said = command("scan", "report", tmp_path / "run", "-o", page).out
    assert "azure 2024-09-01, flagged images: Violence 2" in said
    assert "azure: not checked in 3, as nano-flux2 cannot see 'swastika': Hate" in said
    assert "In the categories of rekognition" in page.read_text()
    # From records alone the counts are the same.
    collected, again = collect([tmp_path / "run"]).tally, collect([part]).tally
    assert collected.taxonomies == Tally.from_dict(again.to_dict()).taxonomies

    assert "was begun with taxonomies" in command(*given, *run, "--resume").err
    refused = command(*given, "--run", tmp_path / "b", "--taxonomy", "openai")
    assert (refused.code, "maps no concept to the taxonomy" in refused.err) == (2, True)
