"""The report of a run in a real browser: it fits a phone, and asks for nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_browser
from scan_helpers import HOSTILE
from test_tally import broken, record, tally_of

from latentguard.scan.parts import Collected
from latentguard.scan.run_report import write
from latentguard.scan.sampling import SamplePlan

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    names = [name.encode("utf-8", "replace").decode() for name in HOSTILE]
    tally = tally_of(
        *[
            record({"beer": m, "gun": m - 0.3}, n, name=names[n % len(names)], preview=pixels)
            for n, m in enumerate(random.normal(0, 0.2, 300).tolist())
        ],
        *[broken(name, n) for n, name in enumerate(names)],
    )
    tally.add_seconds(1, 2, 3)
    tally.sample = SamplePlan.of("abc", 9).start().with_shard("a", 400, {"allow": 3, "block": 3})
    path = tmp_path_factory.mktemp("run") / "run.html"
    write(path, Collected(tally, 3, [(name, 1) for name in names]))
    return path


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(browser: Browser, page: Path, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.send("Emulation.setEmulatedMedia", features=features)
    browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=800, deviceScaleFactor=1, mobile=width < 800,
    )  # fmt: skip
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.title").startswith("Run with policy made")
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.complaints() == []
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert dark == (scheme == "dark")
    assert browser.run("document.querySelectorAll('.gravest img').length") == 8
    assert browser.run("[...document.images].every(image => image.naturalWidth === 16)")
    labels = "[...document.querySelectorAll('.one[open] .ticks span')]"
    inside = f"{labels}.every(s => s.getBoundingClientRect().right <= innerWidth)"
    assert browser.run(inside)


def test_pictures_can_be_blurred(browser: Browser, page: Path) -> None:
    browser.open(page)
    look = "getComputedStyle(document.querySelector('.gravest .view')).filter"
    assert browser.run(look) == "none"
    browser.run("document.querySelector('.blur').click()")
    assert browser.run(look) == "blur(9px)"
