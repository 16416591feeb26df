"""The report in a real browser: what people see, click and print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, needs_browser
from scan_helpers import ALWAYS, HOSTILE, NEVER, latents_of, policy_text

from latentguard import load_encoder
from latentguard.files import save_latents
from latentguard.policy import parse_policy
from latentguard.scan import Report, Scan, Summary
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

pytestmark = needs_browser

SHOWN = "[...document.querySelectorAll('.card')].filter(c => c.offsetParent !== null)"
HEATS = (
    "[...document.querySelectorAll('.heat')].filter(h => getComputedStyle(h).display !== 'none')"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real scan: hostile names, about half of the images blocked, one file broken."""
    folder = tmp_path_factory.mktemp("report")
    names = [*HOSTILE[:8], *(f"plain-{n}" for n in range(8))]
    names = [name.encode("utf-8", "replace").decode() for name in names]
    latents = Latents(latents_of(16, side=32), "flux2", True, ids=names)
    save_latents(folder / "a.pt", latents)
    (folder / "broken.pt").write_bytes(b"broken")
    encoder = load_encoder("nano-flux2")
    rules = [("revolver", "block", NEVER), ("syringe", "review", NEVER)]
    rules += [("wine bottle", "observe", ALWAYS), ("nazi rally", "block", NEVER)]
    scores = Scorer(parse_policy(policy_text(*rules)), encoder).score(latents)
    middle = float(torch.median(scores.margin[:, 0]))
    rules[0] = ("revolver", "block", round(middle, 6))
    (folder / "made.yaml").write_text(policy_text(*rules))
    run = Scan(
        [folder / "a.pt", folder / "broken.pt"],
        folder / "made.yaml",
        encoder,
        previews=True,
        heatmaps=True,
    )
    page, summary = Report(run.rules), Summary(run.policy_id)
    for record in run:
        page.add(record)
        summary.add(record)
    assert 4 <= summary.outcomes["block"] <= 12
    page.write(folder / "report.html", run.models, summary)
    return folder / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Browser:
    browser.send("Emulation.setEmulatedMedia", media="", features=[])
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(report)
    return browser


def _count(page: Browser, elements: str) -> Any:
    return page.run(f"{elements}.length")


def test_it_asks_for_nothing_and_complains_of_nothing(page: Browser, report: Path) -> None:
    assert page.requests() == [report.resolve().as_uri()]
    assert page.complaints() == []
    assert page.run("document.title").startswith("Scan with policy made: 17 images")


def test_names_are_text_to_the_browser(page: Browser) -> None:
    names = page.run("[...document.querySelectorAll('.card h3')].map(h => h.textContent)")
    assert HOSTILE[0] in names
    assert HOSTILE[1] in names
    assert not any("\x1b" in name or "\u202e" in name for name in names)
    assert page.run("document.querySelectorAll('script').length") == 1
    assert page.run("document.querySelectorAll('style').length") == 1
    assert page.run("document.querySelectorAll('img:not([src^=\"data:image/png\"])').length") == 0


def test_injected_scripts_would_not_run(page: Browser) -> None:
    """The second wall: what slipped past the escaping is stopped by the page's own policy."""
    page.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 1';"
        " document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
        ' \'<img src="https://example.org/x.png" onerror="window.owned = 2">\'); })()'
    )
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("window.owned === undefined")
    assert any("Content Security Policy" in text for text in page.complaints())


def test_every_picture_is_drawn(page: Browser) -> None:
    assert page.run("document.querySelectorAll('.view').length") == 16
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    sizes = page.run("[...document.querySelectorAll('.view')].map(i => i.naturalWidth)")
    assert set(sizes) == {32}


def test_scores_stand_right_of_the_threshold_exactly_when_they_match(page: Browser) -> None:
    page.run("document.querySelectorAll('.more').forEach(d => d.open = true)")
    rows = page.run(
        "[...document.querySelectorAll('.row')].map(r => ["
        " r.classList.contains('matched'),"
        " r.querySelector('.fill').getBoundingClientRect().right"
        " - r.querySelector('.limit').getBoundingClientRect().left])"
    )
    assert len(rows) == 16 * 3
    for matched, distance in rows:
        # The mark is two pixels wide and a bar at least one.
        assert distance > -1.5 if matched else distance < 2.5


def test_filters(page: Browser) -> None:
    total = _count(page, SHOWN)
    assert total == 17
    page.run("document.querySelector('input[name=outcome][value=allow]').click()")
    assert page.run(f"{SHOWN}.every(c => c.dataset.outcome !== 'allow')")
    flagged = _count(page, SHOWN)
    assert 0 < flagged < total
    assert page.run("document.getElementById('shown').textContent") == f"{flagged} of 17 shown"
    pick = "(name => { const s = document.getElementById('concept'); s.value = name;"
    pick += " s.dispatchEvent(new Event('change')); })"
    page.run(f"{pick}('revolver')")
    assert _count(page, SHOWN) == page.run(
        "[...document.querySelectorAll('.card')]"
        ".filter(c => c.dataset.matched.split(' ').includes('revolver')).length"
    )
    page.run(f"{pick}('')")
    page.run("document.querySelector('input[name=outcome][value=allow]').click()")
    find = "(text => { const s = document.getElementById('search'); s.value = text;"
    find += " s.dispatchEvent(new Event('input')); })"
    page.run(f"{find}('PLAIN-3')")
    assert _count(page, SHOWN) == 1
    page.run(f"{find}('no such image')")
    assert _count(page, SHOWN) == 0
    assert page.run("!document.getElementById('nothing').hidden")


def test_heat_maps_can_be_switched_and_chosen(page: Browser) -> None:
    flagged = page.run("document.querySelectorAll('.card.block, .card.review').length")
    assert _count(page, HEATS) == flagged
    page.run("document.getElementById('heat-all').click()")
    assert _count(page, HEATS) == 16
    page.run("document.getElementById('heat-off').click()")
    assert _count(page, HEATS) == 0
    page.run("document.getElementById('heat-all').click()")
    page.run("document.querySelector('.card .p2').click()")
    assert page.run(f"{HEATS}[0].className") == "heat h2"
    assert page.run(
        "(() => { const f = document.querySelector('.frame').getBoundingClientRect();"
        " const h = document.querySelector('.heat.h2 img').getBoundingClientRect();"
        " return Math.abs(f.width - h.width) + Math.abs(f.height - h.height) < 1; })()"
    )


def test_model_limits_are_in_sight(page: Browser) -> None:
    text = page.run("document.querySelector('.limits').innerText")
    assert "Cannot see 1 of 4 concepts." in text
    assert "nazi-rally" in text
    assert page.run("document.querySelectorAll('.card .unseen').length") == 16
    assert "not checked" in page.run("document.querySelector('.concepts').innerText")


def test_it_works_without_scripts(browser: Browser, report: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.load(report)
        document = browser.send("DOM.getDocument", depth=-1)["root"]["nodeId"]

        def count(selector: str) -> int:
            found = browser.send("DOM.querySelectorAll", nodeId=document, selector=selector)
            return len(found["nodeIds"])

        assert count(".card:not([hidden])") == 17
        assert count(".find[hidden]") == 1
        assert count(".heat.h1") == 16
        assert count("#heat-all") == 1
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Browser, scheme: str) -> None:
    """WCAG's contrast of 4.5 for text, computed from what the browser resolved."""
    page.send(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    ratios = page.run(
        """(() => {
          const rgb = c => c.match(/[\\d.]+/g).map(Number);
          const light = c => { const [r, g, b] = rgb(c).map(v => { v /= 255;
            return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (rgb(c).length === 3) return c; } return 'rgb(255, 255, 255)'; };
          const out = {};
          for (const s of ['h1', '.version', '.facts dt', '.limits .notes', '.card h3', '.where',
                           '.reason', '.figures', '.name', '.badge.block', '.badge.allow',
                           '.badge.error', 'footer li', '.n.some', '.legend', 'code']) {
            const e = document.querySelector(s);
            const a = light(getComputedStyle(e).color), b = light(ground(e));
            out[s] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }
          return out; })()"""
    )
    assert {selector: ratio for selector, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_screen(page: Browser, width: int) -> None:
    page.send(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    try:
        assert page.run("document.documentElement.scrollWidth") <= width
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def test_print_hides_what_cannot_be_clicked(page: Browser) -> None:
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.querySelector('.find')).display") == "none"
    assert page.run("getComputedStyle(document.querySelector('.pick')).display") == "none"
    assert page.run("document.querySelector('.card').getBoundingClientRect().height > 50")
    page.send("Emulation.setEmulatedMedia", media="")
