"""Names that attack whoever reads them, through every sink."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import decided
from scan_helpers import HOSTILE, NEVER, policy_text

from latentguard.judge import Rules, failed
from latentguard.policy import parse_policy
from latentguard.scan import ModelId, ModelInfo, Report, ScanRecord, Summary
from latentguard.scan.lines import Csv, JsonLines
from latentguard.scan.record import rank
from latentguard.scan.table import Table

PLAIN = parse_policy(
    policy_text(("revolver", "block", 0.0), ("wine bottle", "review", NEVER))
).to_dict()
RULES = Rules.of(PLAIN)
POLICY = RULES.policy
MODEL = ModelId("nano-flux2", "ab" * 32)
ANY_TEXT = st.text(st.characters(categories=None), max_size=80) | st.sampled_from(HOSTILE)


def record(
    order: int = 0,
    source: str = "a.pt",
    name: str | None = None,
    margin: float = -0.5,
    error: str | None = None,
    pictures: bool = False,
) -> ScanRecord:
    if error is not None:
        verdict = failed(error, RULES)
        return ScanRecord(source, order, name, None, verdict, POLICY)
    verdict = decided(
        [[0.9 if margin >= 0 else 0.1, 0.2]],
        [[margin, -0.7]],
        [[0, 1]],
        PLAIN,
    )[0]
    heat = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)
    return ScanRecord(
        source,
        order,
        name,
        "flux2",
        verdict,
        POLICY,
        MODEL,
        (16, 24),
        preview=np.full((16, 24, 3), 90, np.uint8) if pictures else None,
        heatmaps={"revolver": heat, "wine-bottle": -heat} if pictures else None,
        ranked=tuple(rank(verdict.concepts, RULES)),
    )


def rendered(*records: ScanRecord, max_cards: int = 1000, **info: Any) -> str:
    report, summary = Report(RULES, max_cards), Summary(POLICY)
    for one in records:
        report.add(one)
        summary.add(one)
    thresholds = {"revolver": 0.0, "wine-bottle": NEVER}
    return report.render([ModelInfo(MODEL, "flux2", thresholds=thresholds, **info)], summary)


class Page(HTMLParser):
    """Tags and attributes of a page, as a browser's parser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


HALF_SEEN = """\
schema_version: 1
name: half
version: "1"
uncovered: warn
concepts:
  - id: blades
    category: weapons
    prompts: [hatchet, knife, sword]
    threshold: {probability: 0.5}
    action: block
"""


def half_seen() -> ScanRecord:
    """Allowed by a model that sees the hatchet alone."""
    plain = parse_policy(HALF_SEEN).to_dict()
    verdict = decided([[0.1]], [[-0.2]], [[0]], plain, seen=[True, False, False])[0]
    ranked = tuple(rank(verdict.concepts, Rules.of(plain)))
    return ScanRecord("a.pt", 0, "knife", "flux2", verdict, POLICY, MODEL, ranked=ranked)


def test_a_table_names_the_prompts_that_were_not_checked() -> None:
    file = io.StringIO()
    table = Table(file)
    table.add(half_seen())
    table.close()
    sentence = "nano-flux2 cannot see, and did not check, prompts of blades: knife, sword"
    assert sentence in file.getvalue()


def test_lines_name_the_prompts_that_were_not_checked() -> None:
    file = io.StringIO()
    JsonLines(file).add(half_seen())
    (concept,) = json.loads(file.getvalue())["concepts"]
    assert (concept["covered"], concept["unseen"]) == (True, ["knife", "sword"])
    file = io.StringIO(newline="")
    Csv(file, Rules.of(parse_policy(HALF_SEEN).to_dict())).add(half_seen())
    (row,) = csv.DictReader(io.StringIO(file.getvalue(), newline=""))
    assert (row["not_checked"], row["prompts_not_checked"]) == ("", "blades: knife, sword")


def test_a_report_names_the_prompts_that_were_not_checked() -> None:
    unseen = {"blades": ("knife", "sword")}
    text = " ".join(Page(rendered(half_seen(), unseen=unseen, unseen_contrast=("jeans",))).text)
    assert "Not checked of blades: knife, sword" in text
    assert "Cannot see 2 of the prompts of blades." in text
    assert "nothing was compared with them: jeans." in text


def shape(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The page's tags and attribute names: what a name must not be able to change."""
    return [(tag, tuple(attributes)) for tag, attributes in Page(text).tags]


HARMLESS = rendered(record(0, "s", "n", 0.5), record(1, "s", "n", error="e"))


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_no_name_changes_the_markup_of_a_report(source: str, name: str, error: str) -> None:
    page = rendered(record(0, source, name, 0.5), record(1, source, name, error=error))
    # An empty name or source only changes which text is shown, never a tag or attribute.
    assert shape(page) == shape(HARMLESS)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", page)


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_no_name_reaches_a_terminal_as_anything_but_text(source: str, name: str) -> None:
    file = io.StringIO()
    table = Table(file)
    table.add(record(0, source, name, 0.5))
    table.add(record(1, "other", name, error=f"cannot read {name}"))
    table.close()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", file.getvalue())
    file.getvalue().encode("utf-8")


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_json_keeps_every_name_in_one_ascii_line(source: str, name: str) -> None:
    file = io.StringIO()
    JsonLines(file).add(record(0, source, name, 0.5))
    (line,) = file.getvalue().splitlines()
    assert line.isascii()
    assert line.isprintable()
    read = json.loads(line)
    # A pair of lone surrogates is read back as the character that it encodes.
    pairs = "surrogatepass"
    assert read["id"].encode("utf-16", pairs) == name.encode("utf-16", pairs)
    assert read["source"].encode("utf-16", pairs) == source.encode("utf-16", pairs)


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_csv_stays_one_row_without_formulas(source: str, name: str) -> None:
    file = io.StringIO(newline="")
    sink = Csv(file, RULES)
    sink.add(record(0, source, name, 0.5))
    sink.add(record(1, source, name, error=name))
    sink.close()
    rows = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert len(rows) == 2
    for row in rows:
        for key, cell in row.items():
            if key not in ("score", "threshold") and not key.startswith("p:"):
                assert not cell.lstrip().startswith(tuple("=+-@＝＋－＠"))
    assert file.getvalue().count("\n") == 3


def test_a_report_asks_nothing_of_any_network() -> None:
    page = Page(rendered(record(0, "a.pt", "n", 0.5, pictures=True), record(1, name="m")))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for key, value in attributes.items():
            assert key not in ("href", "srcset", "action", "ping", "background")
            assert not key.startswith("on")
            if key == "src":
                assert value.startswith("data:image/png;base64,")
    assert not page.named("script")[0]
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-eval" not in policy
    assert not re.search(r"url\(|@import|https?:", "".join(page.text))


def test_a_report_says_what_a_model_cannot_see() -> None:
    page = " ".join(
        Page(rendered(record(), uncovered=("wine-bottle",), notes="Sees <objects>.\n\nOnly.")).text
    )
    assert "What this scan cannot see" in page
    assert "Cannot see 1 of 2 concepts." in page
    assert "Sees <objects>." in page
    assert "Only." in page


def test_a_report_shows_thresholds_and_scores() -> None:
    page = rendered(record(0, name="caught", margin=0.5, pictures=True))
    texts = Page(page).text
    assert "0.500" in texts
    assert any("≥ 0.000" in text for text in texts)
    marks = [a["style"] for a in Page(page).named("i") if a.get("class") == "limit"]
    fills = [a["style"] for a in Page(page).named("b") if a.get("class") == "fill"]
    assert len(marks) == len(fills) == 2
    # Threshold 0 stands in the middle of the margins' axis, a score of 0.5 to the right of it.
    assert marks[0] == "left:50.00%"
    assert float(re.findall(r"[\d.]+", fills[0])[0]) > 50
    assert page.count('class="heat h') == 2
    assert 'class="edge"' in page


def test_a_report_keeps_what_matters_and_says_what_it_left_out() -> None:
    records = [record(n, name=f"image-{n}", margin=0.5 if n % 10 == 9 else -0.5) for n in range(50)]
    records.append(record(50, name="broken", error="cannot be read"))
    page = rendered(*records, max_cards=8)
    shown = [a["data-outcome"] for a in Page(page).named("article")]
    assert shown == ["block"] * 5 + ["error"] + ["allow"] * 2
    assert "8 of 51 images are shown" in page
    assert "6 of 51 images not allowed" in page
    assert "image-0" in page


def test_the_table_keeps_what_matters_and_says_what_it_left_out() -> None:
    file = io.StringIO()
    table = Table(file, max_rows=4)
    for n in range(30):
        table.add(record(n, name=f"image-{n}", margin=0.5 if n in (12, 25) else -0.5))
    table.close()
    assert [n for n in range(30) if f"image-{n} " in file.getvalue()] == [0, 1, 12, 25]
    assert "4 of 30 images are shown" in file.getvalue()


def of_a_hostile_artifact(text: str) -> tuple[Rules, ScanRecord]:
    """A policy as an exported file may hold it: its ids and its model's name are any text."""
    ids = (text, f"{text}!")
    concepts = [{**c, "id": name} for c, name in zip(PLAIN["concepts"], ids, strict=True)]
    plain = {**PLAIN, "concepts": concepts}
    plain["uncovered"] = "warn"
    verdict = decided([[0.9, 0.2]], [[0.5, -0.7]], [[0, 1]], plain, covered=[True, False])[0]
    model = ModelId(text, "ab" * 32)
    made = ScanRecord("a.pt", 0, "x", "flux2", verdict, POLICY, model, (16, 24))
    return Rules.of(plain), made


@pytest.mark.parametrize("text", ["guns\x1b[2J", "guns\u3164", "guns\u202e", "=1+1", "a,=1+1"])
def test_names_from_an_exported_file_are_only_text(text: str) -> None:
    plain, made = of_a_hostile_artifact(text)
    shown, cells = io.StringIO(), io.StringIO(newline="")
    table = Table(shown)
    table.add(made)
    table.close()
    assert not re.search("[\x00-\x09\x0b-\x1f\u3164\u202e]", shown.getvalue())
    sink = Csv(cells, plain)
    sink.add(made)
    for row in csv.reader(io.StringIO(cells.getvalue(), newline="")):
        for cell in row:
            assert not re.search("[\x00-\x1f\u3164\u202e]", cell)
            assert not re.search(r"(^|[,;|])\s*[=+@]", cell)


def test_records_in_memory_carry_no_pictures() -> None:
    report = Report(RULES, 10)
    report.add(record(0, pictures=True))
    (card,) = report.cards()
    assert card.record.preview is None
    assert card.record.heatmaps is None
    assert card.preview is not None
    assert len(card.preview) < 1000


@pytest.mark.parametrize("kind", ["probability", "margin"])
def test_histograms_hold_every_image(kind: str) -> None:
    text = policy_text(("revolver", "block", 0.0)).replace("margin: 0.0", f"{kind}: 0.5")
    plain = parse_policy(text).to_dict()
    report = Report(Rules.of(plain))
    margins = np.linspace(-1, 1, 21)
    probabilities = 1 / (1 + np.exp(-3 * margins))
    verdicts = decided(
        probabilities[:, None],
        margins[:, None],
        np.zeros((21, 1), int),
        plain,
    )
    for n, verdict in enumerate(verdicts):
        report.add(
            ScanRecord(
                "a", n, None, "flux2", verdict, POLICY, MODEL, (8, 8), ranked=verdict.concepts
            )
        )
    tally = report.tallies["revolver"]
    assert tally.kind == kind
    assert tally.scores.sum() == tally.judged == 21
    scores = probabilities if kind == "probability" else margins
    assert tally.matched == (scores >= 0.5).sum()
    assert tally.highest == pytest.approx(scores.max())


def test_former_names_of_what_a_report_holds() -> None:
    report: Any = Report
    with pytest.warns(DeprecationWarning, match="argument limit is called max_cards now"):
        report(RULES, limit=4)
    with pytest.warns(DeprecationWarning, match="limits is called thresholds now"):
        assert ModelInfo(MODEL, "flux2", thresholds={"a": 1.0}).limits == {"a": 1.0}
