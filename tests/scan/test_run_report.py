"""`latentguard scan report`: parts of any kind become one page, and nothing is counted twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from test_scan_sinks import ANY_TEXT, Page, shape
from test_tally import MODEL, POLICY, broken, record, tally_of

from latentguard.errors import UsageError
from latentguard.scan import ModelInfo
from latentguard.scan.alternatives import alternative, alternatives, curve
from latentguard.scan.concept_tally import ConceptTally, Judge
from latentguard.scan.lines import JsonLines
from latentguard.scan.parts import Collected, collect, record_of
from latentguard.scan.run_report import render
from latentguard.scan.sampling import SamplePlan
from latentguard.scan.tally import Tally
from latentguard.scan.tally_file import tally_bytes, write_tally

PIXELS = np.full((8, 8, 3), 90, np.uint8)


def jsonl(path: Path, *records: Any) -> Path:
    with path.open("w", encoding="ascii") as file:
        sink = JsonLines(file)
        for one in records:
            sink.add(one)
    return path


def rendered(*records: Any, **keys: Any) -> str:
    collected = Collected(tally_of(*records), **keys)
    return render(collected)


def concept(*margins: float) -> ConceptTally:
    tally = tally_of(*[record({"beer": m}, n) for n, m in enumerate(margins)])
    return tally.judges[Judge(*MODEL, "flux2")].concepts["beer"]


def test_records_are_read_back_as_they_were_counted(tmp_path: Path) -> None:
    records = [record({"beer": 0.4, "gun": -0.1}, n, name=f"n{n}") for n in range(3)]
    records.append(broken("is empty", 3))
    part = jsonl(tmp_path / "a.jsonl", *records)
    assert collect([part]).tally.to_dict() == tally_of(*records).to_dict()


def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    pytest.importorskip(
        "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
    )
    from latentguard.scan.schema import Numbering
    from latentguard.scan.sinks import open_sink

    records = [record({"beer": 0.4, "gun": -0.1}, n) for n in range(3)] + [broken("x", 3)]
    for name in ("json", "parquet"):
        path = tmp_path / f"a.{'jsonl' if name == 'json' else name}"
        sink = open_sink(name, path)  # type: ignore[arg-type]
        numbering = Numbering()
        sink.add([numbering.row(one) for one in records])
        sink.close()
        assert collect([path]).tally.to_dict() == tally_of(*records).to_dict()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UsageError, match=r"bad.parquet: cannot be read as Parquet"):
        collect([tmp_path / "bad.parquet"])


def run_folder(folder: Path, with_tally: bool) -> Path:
    """A run of two shards, the second with errors."""
    for name in ("manifest", "parts", "tallies", "quarantine"):
        (folder / name).mkdir(parents=True)
    shards = [
        [record({"beer": 0.4}, 0, "a")],
        [record({"beer": -0.4}, 0, "b"), broken("x", 1, "b")],
    ]
    for number, records in enumerate(shards):
        jsonl(folder / "parts" / f"{number}.jsonl", *records)
        entry: dict[str, Any] = {"number": number, "part": {"name": f"parts/{number}.jsonl"}}
        if with_tally:
            data = tally_bytes(tally_of(*records))
            name = f"tallies/{number:06d}.json"
            (folder / name).write_bytes(data)
            digest = sha256(data).hexdigest()
            entry["tally"] = {"name": name, "size": len(data), "sha256": digest, "rows": 1}
        if number:
            entry["quarantine"] = {"name": "quarantine/1.jsonl", "rows": 1}
        (folder / "manifest" / f"{number:06d}.json").write_text(json.dumps(entry))
    return folder


@pytest.mark.parametrize("with_tally", [True, False])
def test_a_run_is_the_sum_of_its_shards(tmp_path: Path, with_tally: bool) -> None:
    found = collect([run_folder(tmp_path / "run", with_tally)])
    assert (found.tally.images, found.shards) == (3, 2)
    assert found.tally.outcomes == {"block": 1, "allow": 1, "error": 1}
    assert found.quarantine == [(f"{tmp_path}/run/quarantine/1.jsonl", 1)]
    page = " ".join(Page(render(found)).text)
    assert "run/quarantine/1.jsonl" in page
    assert "Shards done" in page


def test_a_tally_that_is_not_the_one_that_was_written_is_not_counted(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", True)
    path = run / "tallies" / "000001.json"
    path.write_bytes(path.read_bytes().replace(b'"block":1', b'"block":7'))
    with pytest.raises(UsageError, match=r"tallies/000001\.json was changed after"):
        collect([run])


def test_all_kinds_of_parts_go_together(tmp_path: Path, command: Any) -> None:
    run = run_folder(tmp_path / "run", True)
    part = jsonl(tmp_path / "more.jsonl", record({"beer": 0.1}, source="c"))
    write_tally(tmp_path / "third.json", tally_of(record({"beer": 0.2}, source="d")))
    merged = tmp_path / "all.json"
    ran = command("scan", "report", run, part, tmp_path / "third.json", "-o", merged)
    assert (ran.code, ran.err) == (0, "")
    assert "5 images in 2 shards: 1 allowed, 0 review, 3 blocked, 1 error ·" in ran.out
    page = tmp_path / "all.html"
    assert command("scan", "report", merged, "-o", page, "-q").out == ""
    assert "4 of 5 images not allowed" in page.read_text(encoding="utf-8")
    assert Tally.from_dict(json.loads(merged.read_bytes())).images == 5


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "must be a run folder, or end in"),
        ("a.json", b"{}", "is not a tally"),
        ("a.json", b"[", "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.jsonl", b'{"source": NaN}\n', "NaN is not a number"),
        ("a.jsonl", b'{"source": "a"}\n', "record 1: must have a source and an index"),
        ("a.jsonl", b"[]\n", "record 1: must be an object"),
        ("manifest/0.json", b"{}", "has neither a tally nor a part"),
        ("manifest/0.json", b'{"part": {"name": "../x.jsonl"}}', "outside its run"),
        ("manifest/0.json", b'{"part": {"name": "/etc/x.jsonl"}}', "outside its run"),
        ("manifest/0.json", b'{"tally": {}}', "has neither a tally nor a part"),
        ("manifest/0.json", b'{"tally": {"name": "../x.json"}}', "outside its run"),
        (
            "manifest/0.json",
            b'{"tally": {"name": "tallies/0.json"}}',
            "tallies/0.json is missing",
        ),
        ("manifest/0.json", b'{"schema_version": 1}', "is of another version of latentguard"),
        ("parts/0.json", b"{}", "not a run with finished shards"),
        ("missing.json/x", b"", "not a run with finished shards"),
    ],
)
def test_what_is_no_part_is_an_error_that_names_it(
    tmp_path: Path, command: Any, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    part = path if path.parent == tmp_path else path.parents[-len(tmp_path.parts) - 1]
    part = tmp_path if name.startswith(("manifest", "parts")) else part
    ran = command("scan", "report", part, "-o", tmp_path / "out.html")
    assert ran.code == 2
    assert said in ran.err
    assert str(part) in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out.html").exists()


def test_parts_that_cannot_be_counted_as_one(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "a.jsonl", record({"beer": 0.1}))
    other = POLICY._replace(sha256="99" * 32)
    two = jsonl(tmp_path / "b.jsonl", record({"beer": 0.1}, policy=other))
    with pytest.raises(UsageError, match=r"b\.jsonl: two policies cannot be counted as one"):
        collect([one, two])
    with pytest.raises(UsageError, match=r"a\.jsonl is given twice"):
        collect([one, tmp_path / "." / "a.jsonl"])
    with pytest.raises(UsageError, match=r"c\.jsonl cannot be read: No such file"):
        collect([tmp_path / "c.jsonl"])


@pytest.mark.parametrize("target", ["a.jsonl", "out.txt", "folder.html", "no/such/out.html"])
def test_what_is_not_written(tmp_path: Path, command: Any, target: str) -> None:
    part = jsonl(tmp_path / "a.jsonl", record({"beer": 0.1}))
    before = part.read_bytes()
    (tmp_path / "folder.html").mkdir()
    ran = command("scan", "report", part, "-o", tmp_path / target)
    assert ran.code == 2
    assert part.read_bytes() == before


def test_a_tally_is_not_written_over(tmp_path: Path, command: Any) -> None:
    part = tmp_path / "a.json"
    write_tally(part, tally_of(record({"beer": 0.1})))
    ran = command("scan", "report", part, "-o", part)
    assert (ran.code, "would write over a part" in ran.err) == (2, True)


def test_a_path_that_is_called_report_can_be_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: Path, command: Any
) -> None:
    from scan_helpers import write_latents

    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").mkdir()
    write_latents(tmp_path / "report" / "a.pt", 2)
    for arguments in (("./report", "--policy", calm), ("--policy", calm, "report")):
        ran = command("scan", *arguments)
        assert (ran.code, "2 images: 2 allowed" in ran.out) == (0, True)
    assert "Missing option" in command("scan", "report", "report").err


def test_help_teaches_both(command: Any) -> None:
    assert "latentguard scan report PART" in command("scan", "--help").out
    assert "./report" in command("scan", "report", "--help").out
    assert "scan report" in command("--help").out


# -- what other thresholds would do ----------------------------------------------------------


def test_other_thresholds_match_what_they_would(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    margins = random.normal(-0.1, 0.2, 3000)
    made = concept(*margins.tolist())
    probabilities = 1 / (1 + np.exp(-10 * margins))
    rows = alternatives(made)
    assert [row.threshold for row in rows] == [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
    for row in rows:
        truth = int((probabilities >= row.threshold).sum())
        assert row.low <= truth <= row.high
        assert row.high - row.low < 40  # what lies in one bin of 3,000 images
        assert row.in_force == (row.threshold == 0.5)
    (now,) = [row for row in rows if row.in_force]
    assert now.low == now.high == made.matched == (probabilities >= 0.5).sum()


def test_the_curve_is_exact_at_the_edges_of_bins() -> None:
    margins = np.random.default_rng(2).normal(0, 0.3, 500)
    made = concept(*margins.tolist())
    probabilities = 1 / (1 + np.exp(-10 * margins))
    points = curve(made)
    assert points[0][1] == 500
    assert points[-1][1] == 0
    for threshold, count in points[1:-1]:
        assert count == (probabilities >= threshold).sum()
    assert [count for _, count in points] == sorted((c for _, c in points), reverse=True)


def test_margins_have_round_thresholds() -> None:
    made = concept(*np.linspace(-0.31, 0.42, 100).tolist())
    made.threshold.update(kind="margin", value=0.123)
    rows = alternatives(made)
    assert [row.threshold for row in rows] == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.123, 0.2, 0.3, 0.4]
    assert alternative(made, 5.0).high == 0
    assert alternative(made, -5.0).low == 100
    assert alternatives(ConceptTally("a", "block", {"kind": "margin", "value": 0.1})) == []


# -- the page --------------------------------------------------------------------------------


def test_a_page_says_what_the_model_cannot_see_first() -> None:
    collected = Collected(tally_of(record({"beer": 0.4})))
    hidden = ModelInfo(MODEL, "flux2", "Sees objects only.", unseen_contrast=("jeans",))
    collected.tally.note_model(hidden)
    judge = collected.tally.judges[Judge(*MODEL, "flux2")]
    judge.concepts["gore"] = ConceptTally("made", "block", {"kind": "margin", "value": 0.1})
    judge.concepts["beer"].unseen = frozenset({"lager"})
    text = " ".join(Page(render(collected)).text)
    assert "Cannot see 1 of 2 concepts." in text
    assert "Cannot see 1 of the prompts of beer." in text
    assert "nothing was compared with them: jeans." in text
    assert text.index("What this scan cannot see") < text.index("What other thresholds would do")


def test_a_page_shows_what_was_counted() -> None:
    tally = tally_of(
        *[record({"beer": n / 50 - 1}, n, name=f"image-{n}", preview=PIXELS) for n in range(100)],
        broken("has 12 bytes", 100),
    )
    tally.add_seconds(read=1, decode=3, score=6)
    tally.bytes_read = 5_000_000
    tally.add_span(1_700_000_000, 1_700_000_010)
    page = render(Collected(tally))
    text = " ".join(Page(page).text)
    assert "51 of 101 images not allowed" in text
    assert "10.1 images/s" in text
    assert "scoring 60 %" in text
    assert "in force" in text
    assert "has # bytes" in text
    assert "image-99" in text
    assert page.count("data:image/png") == 4
    assert len(re.findall('class="curve"', page)) == 1


def test_a_page_of_a_sample_has_intervals() -> None:
    tally = tally_of(record({"beer": 0.4}), record({"beer": -0.4}))
    plan = SamplePlan.of(["a", "b", "c"], 2)
    tally.sample = plan.start().with_shard("a", 10, {"allow": 1}).with_shard("b", 5, {"block": 1})
    text = " ".join(Page(render(Collected(tally))).text)
    assert "A random sample of the whole" in text
    assert "2 images of 2 shards were looked at, out of 3 shards" in text
    assert "33.33 %" in text


def test_a_page_of_nothing_and_of_errors_alone() -> None:
    assert "Nothing was scanned" in render(Collected())
    assert "1 of 1 image not allowed" in rendered(broken("x"))


def test_a_page_asks_nothing_of_any_network_and_has_no_script() -> None:
    page = Page(rendered(record({"beer": 0.4}, preview=PIXELS), broken("x")))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "video")
        for key, value in attributes.items():
            assert key not in ("href", "srcset", "action", "ping", "background")
            assert not key.startswith("on")
            if key == "src":
                assert value.startswith("data:image/png;base64,")
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; img-src data:;")


def _hostile_page(text: str) -> str:
    return rendered(
        record({"beer": 0.4}, 0, text or "a", text or None, preview=PIXELS),
        broken(f"x {text}", 1, text or "a"),
        quarantine=[(text, 1)],
    )


HARMLESS = _hostile_page("a")


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT)
def test_no_name_changes_the_markup_of_a_run(text: str) -> None:
    page = _hostile_page(text)
    assert shape(page) == shape(HARMLESS)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", page)


def test_a_record_needs_its_policy() -> None:
    row = record({"beer": 0.4}).to_dict()
    assert record_of(row).to_dict() == row
    for change in ({"policy": None}, {"policy": {"name": 1}}, {"index": -2}, {"id": 4}):
        with pytest.raises(ValueError, match=r"\w"):
            record_of({**row, **change})


@pytest.fixture
def scanned(tmp_path: Path, policy: Callable[..., Path]) -> tuple[Path, Path]:
    from scan_helpers import write_latents

    file = write_latents(tmp_path / "a.pt", 3, side=8, ids=["x", "y", "z"])
    return file, policy(("revolver", "block", -2.0), ("nazi rally", "block", 2.0))


def test_a_scan_writes_its_tally(scanned: tuple[Path, Path], tmp_path: Path, command: Any) -> None:
    file, rules = scanned
    target = tmp_path / "run.json"
    ran = command("scan", file, "--policy", rules, "--summary", target, "--format", "json")
    assert ran.code == 1
    assert f"summary: {target}" in ran.err
    assert len(ran.out.splitlines()) == 3
    tally = Tally.from_dict(json.loads(target.read_bytes()))
    assert tally.outcomes == {"block": 3}
    assert tally.seconds("score") > 0
    ((judge, counts),) = tally.judges.items()
    assert (judge.name, judge.space, counts.images) == ("nano-flux2", "flux2", 3)
    assert counts.concepts["nazi-rally"].unchecked == 3
    assert counts.notes
    previews = [example.preview for example in counts.concepts["revolver"].gravest]
    assert len(previews) == 3
    assert None not in previews
    page = tmp_path / "run.html"
    assert command("scan", "report", target, "-o", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "3 of 3 images not allowed" in text
    assert "nazi-rally" in text
    assert text.count("data:image/png") == 3


def test_a_scan_of_a_sample_says_what_it_estimates(
    scanned: tuple[Path, Path], tmp_path: Path, command: Any
) -> None:
    file, rules = scanned
    target = tmp_path / "run.json"
    arguments = (file, "--policy", rules, "--sample", 2, "--seed", 4, "--summary", target)
    ran = command("scan", *arguments)
    assert ran.code == 1
    assert "sample: 2 images of 1 of 1 shards (seed 4)" in ran.out
    assert "block: 100 % (at least" in ran.out
    tally = Tally.from_dict(json.loads(target.read_bytes()))
    assert tally.sample is not None
    assert (tally.images, tally.sample.size) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed", 1), "need --sample IMAGES"),
        (("--sample-shards", 1), "need --sample IMAGES"),
        (("--sample", 0), "greater than or equal to 1"),
        (("--sample", 5, "--run", "run", "--keep", "allow"), "--keep needs whole shards"),
        (("--sample", 5, "--run", "run", "--task", "0/2"), "leave out --task"),
        (("--summary", "out.txt"), "must be a file that ends in .json"),
        (("--summary", "no/such/run.json"), "there is no folder"),
        (("--metrics-port", 70000), "less than or equal to"),
        (("--output", "a.pt"), "would write over latents"),
    ],
)
def test_options_that_do_not_go_together(
    scanned: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
    arguments: tuple[Any, ...],
    said: str,
) -> None:
    file, rules = scanned
    monkeypatch.chdir(file.parent)
    before = file.read_bytes()
    ran = command("scan", "a.pt", "--policy", rules, *arguments)
    assert (ran.code, said in ran.err) == (2, True), ran.err
    assert file.read_bytes() == before


def test_progress_as_json_lines(scanned: tuple[Path, Path], command: Any) -> None:
    file, rules = scanned
    ran = command("scan", file, "--policy", rules, "--progress", "json", "-q")
    (last,) = [json.loads(line) for line in ran.err.splitlines()][-1:]
    assert (last["images"], last["errors"], last["finished"]) == (3, 0, True)
    assert last["share_blocked"] == 1
    assert set(last["busy"]) == {"reading", "scoring"}


def test_a_run_is_reported(scanned: tuple[Path, Path], tmp_path: Path, command: Any) -> None:
    file, rules = scanned
    run = tmp_path / "run"
    arguments = (file, tmp_path / "missing.pt", "--policy", rules, "--run", run, "--workers", 0)
    ran = command("scan", *arguments, "--sink", "json", "--progress", "json", "--previews")
    assert ran.code == 3
    lines = [json.loads(line) for line in ran.err.splitlines() if line.startswith("{")]
    assert (lines[-1]["images"], lines[-1]["shards_done"], lines[-1]["shards"]) == (4, 2, 2)
    assert command("scan", "report", run, "-o", tmp_path / "run.html").code == 0
    page = (tmp_path / "run.html").read_text("utf-8")
    assert page.count("data:image/png") == 3
    text = " ".join(Page(page).text)
    assert "4 of 4 images not allowed" in text
    assert "1 image could not be read or judged" in text
    assert "does not exist" in text
    parts = sorted((run / "parts").glob("*.jsonl"))
    assert collect(parts).tally.outcomes == collect([run]).tally.outcomes


@pytest.mark.slow
def test_a_run_on_another_file_system_is_reported(
    scanned: tuple[Path, Path], tmp_path: Path, command: Any
) -> None:
    pytest.importorskip(
        "fsspec", reason="needs pip install 'latentguard[scale]', which the dev extra has"
    )
    file, rules = scanned
    place = "memory://a-run-that-is-reported"
    arguments = (file, "--policy", rules, "--run", place, "--workers", 0, "--sink", "json", "-q")
    assert command("scan", *arguments).code == 1
    ran = command("scan", "report", place, "-o", tmp_path / "run.json")
    assert (ran.code, ran.err) == (0, "")
    assert "3 images in 1 shard: 0 allowed, 0 review, 3 blocked" in ran.out
    ran = command("scan", "report", place, place, "-o", tmp_path / "run.json")
    assert (ran.code, "is given twice" in ran.err) == (2, True)
    ran = command("scan", "report", "memory://nothing", "-o", tmp_path / "run.json")
    assert (ran.code, "not a run with finished shards" in ran.err) == (2, True)
