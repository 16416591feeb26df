"""The demo page: what its controls do, without torch too, and the page itself in a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser, needs_browser

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "serve")]

from demo_judging import COLUMNS, SIDE, judged, policy_of  # noqa: E402

from latentguard.errors import LatentsError, PolicyError  # noqa: E402
from latentguard.policy import load_policy, shipped_policies  # noqa: E402

FAMILY = shipped_policies()["family"].read_text("utf-8")
LATENTS = EXAMPLES / "latents.pt"

pytest.importorskip("onnxruntime", reason="judging without torch needs onnxruntime")


def test_an_example_is_judged_shown_and_mapped() -> None:
    (shown,) = judged(LATENTS, policy_of(FAMILY), only="revolver", runtime="onnx")
    assert shown.headline.startswith("BLOCK\n")
    assert "firearms" in shown.headline
    assert shown.preview is not None
    assert shown.preview.shape == (SIDE, SIDE, 3)
    assert shown.preview.dtype == np.uint8
    picture, caption = shown.heats[0]
    assert caption.startswith("firearms 0.99")
    assert picture.shape == (SIDE, SIDE, 3)
    assert (picture != shown.preview).any()
    first = dict(zip(COLUMNS, shown.rows[0], strict=True))
    assert first["concept"] == "firearms"
    assert float(first["score"]) > float(first["threshold"])
    assert first[""] == "matched"
    unseen = [row for row in shown.rows if row[-1] == "not visible to this model"]
    assert {row[2] for row in unseen} == {""}  # no score where the model sees nothing


def test_the_drawing_lies_where_the_concept_is() -> None:
    (shown,) = judged(LATENTS, policy_of(FAMILY), only="beer-glass-gravel", runtime="onnx")
    heat = next(picture for picture, caption in shown.heats if caption.startswith("beer "))
    assert shown.preview is not None
    red, blue = (heat[..., c].astype(int) - shown.preview[..., c] for c in (0, 2))
    warmer = red - blue  # yellow over what matches, blue over the rest
    middle = warmer[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4].mean()
    assert middle > warmer[:, : SIDE // 8].mean()


def test_a_file_needs_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "plain.npy"
    np.save(path, np.zeros((3, 32, 16, 24), np.float32))
    policy = policy_of(FAMILY)
    told = judged(path, policy, space="flux2", scaled=True, runtime="onnx")
    assert [one.name for one in told] == ["image 0", "image 1", "image 2"]
    assert told[0].preview is not None
    assert told[0].preview.shape == (SIDE * 16 // 24, SIDE, 3)
    (refused,) = judged(path, policy, runtime="onnx")
    assert refused.headline.startswith("BLOCK\n")
    assert refused.preview is None
    with pytest.raises(LatentsError, match="no latents"):
        judged(LATENTS, policy, only="nobody", runtime="onnx")


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        (FAMILY.replace("action: block", "action: blok", 1), None, "blok"),
        ("schema_version: 1\nname: [", 3, ""),
        ("schema_version: 1\nmodel: /etc/passwd\n", 2, "model"),
        ("name: a\ncascade: {first: x}\n", 2, "cascade"),
        ("name: a\non_block:\n  placeholder: ../secret.png\n", 3, "placeholder"),
        ("name: a\nconcepts:\n  - id: a\n    examples: ../a.concept\n", 4, "examples"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_with_its_line(
    text: str, line: int | None, named: str
) -> None:
    with pytest.raises(PolicyError) as error:
        policy_of(text)
    if line is None:
        line = 1 + text[: text.index("blok")].count("\n")
    assert f"policy:{line}:" in str(error.value)
    assert named in str(error.value)


@pytest.mark.slow
def test_without_torch_the_demo_judges() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from demo_judging import judged, policy_of\n"
        "text = open(sys.argv[2]).read()\n"
        "(shown,) = judged(sys.argv[3], policy_of(text), only='revolver')\n"
        "print(shown.headline.split()[0], len(shown.heats))\n"
    )
    family = str(shipped_policies()["family"])
    command = [sys.executable, "-c", script, str(EXAMPLES), family, str(LATENTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["BLOCK", "9"], done.stderr


# -- the page --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page needs gradio, which the dev extra leaves out")
    pytest.importorskip("diffusers", reason="its third tab generates")
    from gradio_app import Demo, page, serve
    from painters import Choice, painter

    blocks = page(Demo(painter(Choice("exact"))), generates=True)
    try:
        yield serve(blocks, "127.0.0.1", None, wait=False)
    finally:
        blocks.close()


def test_what_the_controls_do(address: str, tmp_path: Path) -> None:
    from gradio_app import FROM_FILE, Demo
    from painters import Choice, painter

    demo = Demo(painter(Choice("exact")))
    assert "revolver" in demo.examples
    images, problem = demo.generate(FAMILY, "a revolver", 0, 4)
    assert problem == ""
    assert images[0].headline.startswith("BLOCK")
    assert "names no class" in demo.generate(FAMILY, "a submarine", None, 4)[1]
    assert demo.upload(FAMILY, None, FROM_FILE, FROM_FILE)[0] == []
    path = tmp_path / "plain.npy"
    np.save(path, np.zeros((1, 32, 32, 32), np.float32))
    assert len(demo.upload(FAMILY, str(path), "flux2", "scaled")[0]) == 1
    assert "policy:1:" in demo.example("name: 3", "cat")[1]
    sha256 = load_policy("family").sha256
    assert demo.check(FAMILY.rstrip()) == f"family 1.0: 13 concepts, {sha256[:12]}"


TABS = "[...document.querySelectorAll('button[role=tab]')]"
OPTION = (
    "[...document.querySelectorAll('ul[role=listbox] li')]"
    ".find(one => one.innerText.includes('beer-glass-pagoda'))"
)
UPLOAD = "document.querySelector('#file input[type=file]')"


@pytest.mark.slow
@needs_browser
def test_the_page(address: str) -> None:
    assert PROGRAM is not None
    with Browser(PROGRAM) as tab:
        tab.visit(address)
        wait(tab, "document.querySelector('#judge-example')")
        tab.run("document.querySelector('#judge-example').click()")
        wait(tab, f"{value('verdict')}.startsWith('BLOCK')")
        assert "firearms" in tab.run(value("verdict"))
        wait(tab, "document.querySelector('#preview img')?.naturalWidth > 0")
        wait(tab, "document.querySelectorAll('#heats img').length >= 9")
        assert "not visible to this model" in tab.run(
            "document.querySelector('#table').textContent"
        )

        tab.run(f"{TABS}.find(tab => tab.innerText == 'Upload').click()")
        wait(tab, UPLOAD)
        found = tab.send("Runtime.evaluate", expression=UPLOAD)["result"]["objectId"]
        tab.send("DOM.setFileInputFiles", files=[str(LATENTS)], objectId=found)
        wait(tab, "document.querySelector('#file').innerText.includes('latents')")
        tab.run("document.querySelector('#judge-file').click()")
        wait(tab, f"{value('verdict')}.startsWith('ALLOW')")  # the astronaut is the first

        tab.run("document.querySelector('#which input').focus()")
        wait(tab, OPTION)
        tab.run(f"{OPTION}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")
        wait(tab, f"{value('verdict')}.includes(\"concept 'beer'\")")

        # Write into the editor, as a keyboard does: the check follows.
        tab.run("document.querySelector('#policy .cm-content').focus()")
        tab.send("Input.insertText", text="schema_version: 7\n")
        wait(tab, f"{value('checked')}.includes('policy:')")

        assert tab.complaints() == []
        elsewhere = [url for url in tab.requests() if not url.startswith(address)]
        assert [url for url in elsewhere if not url.startswith(("blob:", "about:"))] == []


def value(name: str) -> str:
    """The text of a box."""
    return f"(document.querySelector('#{name} textarea')?.value ?? '')"


def wait(tab: Browser, condition: str) -> Any:
    """Until the page is so; the test's own timeout ends it otherwise."""
    return tab.run(
        "new Promise(done => { const look = () => "
        f"({condition}) ? done(true) : setTimeout(look, 50); look(); }})"
    )
