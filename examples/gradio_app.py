"""A page to try policies on: latents in, heat maps and scores out, and the policy beside them.

    pip install 'latentguard[demo]'
    python examples/gradio_app.py

shows the bundled examples and files that you upload, without torch. Where diffusers is installed
the page also generates: the bundled pictures (no weights), or with `--pipeline PATH` anything. It
shows what a policy would block, so it is for those who write policies; a service for users is
examples/serve/generate_app.py.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from demo_judging import COLUMNS, Shown, judged, policy_of

from latentguard.errors import LatentGuardError
from latentguard.files import read_arrays
from latentguard.policy import shipped_policies
from latentguard.scan.judges import Runtime
from latentguard.spaces import RECORDS

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE / "latents.pt"
FROM_FILE = "as the file says"
MAX_UPLOAD = "64mb"
MAX_WAITING = 16


class Demo:
    """What the page's controls do. by: a painter of examples/serve, where it generates."""

    def __init__(self, by: Any | None = None, runtime: Runtime = "auto") -> None:
        self._by, self._runtime = by, runtime
        self._folder = tempfile.TemporaryDirectory(prefix="latentguard-demo-")
        self.examples = [record.id or "" for record in read_arrays(EXAMPLES)]

    def check(self, text: str) -> str:
        """What is wrong with a policy, with its lines; or what it is."""
        try:
            policy = policy_of(text)
        except LatentGuardError as error:
            return str(error)
        count = len(policy.concepts)
        return f"{policy.name} {policy.version}: {count} concepts, {policy.sha256[:12]}"

    def example(self, text: str, name: str) -> tuple[list[Shown], str]:
        """A bundled one. As all that judges, the images and what is wrong; one of them is empty."""
        return self._judge(text, EXAMPLES, only=name)

    def upload(
        self, text: str, path: str | None, space: str, scaled: str
    ) -> tuple[list[Shown], str]:
        """The images of a file."""
        if path is None:
            return [], "upload a .npy, .safetensors or .pt file first"
        return self._judge(
            text,
            path,
            space=None if space == FROM_FILE else space,
            scaled=None if scaled == FROM_FILE else scaled == "scaled",
        )

    def generate(
        self, text: str, prompt: str, seed: float | None, steps: float
    ) -> tuple[list[Shown], str]:
        """What a pipeline makes of a prompt, before any guard."""
        from painters import paint_latents

        from latentguard.files import save_latents

        number = secrets.randbits(32) if seed is None else int(seed)
        path = Path(self._folder.name, f"{secrets.token_hex(8)}.safetensors")
        try:
            save_latents(path, paint_latents(self._by, prompt, number, int(steps)))
            return self._judge(text, path)
        except LatentGuardError as error:
            return [], str(error)
        finally:
            path.unlink(missing_ok=True)

    def _judge(self, text: str, path: str | Path, **said: Any) -> tuple[list[Shown], str]:
        try:
            found = judged(path, policy_of(text), runtime=self._runtime, **said)
        except LatentGuardError as error:
            return [], str(error)
        return found, ""


def page(demo: Demo, generates: bool) -> gr.Blocks:
    """The page."""
    shipped = shipped_policies()
    spaces = [FROM_FILE, *sorted(RECORDS)]
    with gr.Blocks(title="latentguard", analytics_enabled=False) as blocks:
        gr.Markdown("# latentguard\nLatents are judged as they are: nothing is decoded.")
        images = gr.State([])
        with gr.Row():
            with gr.Column():
                with gr.Tab("Examples"):
                    name = gr.Dropdown(demo.examples, value="revolver", label="Picture")
                    show = gr.Button("Judge", variant="primary", elem_id="judge-example")
                with gr.Tab("Upload"):
                    file = gr.File(label="Latents", type="filepath", elem_id="file")
                    space = gr.Dropdown(spaces, value=FROM_FILE, label="Latent space")
                    scaled = gr.Radio([FROM_FILE, "scaled", "raw"], value=FROM_FILE, label="Values")
                    send = gr.Button("Judge", variant="primary", elem_id="judge-file")
                if generates:
                    with gr.Tab("Generate"):
                        prompt = gr.Textbox(label="Prompt", value="a cat", max_length=2000)
                        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                        steps = gr.Slider(1, 100, value=20, step=1, label="Steps")
                        make = gr.Button("Generate", variant="primary", elem_id="generate")
                choice = gr.Dropdown(list(shipped), value="family", label="Policy")
                text = gr.Code(
                    shipped["family"].read_text("utf-8"),
                    language="yaml",
                    label="Policy, as YAML",
                    max_lines=24,
                    elem_id="policy",
                )
                status = gr.Textbox(
                    demo.check(shipped["family"].read_text("utf-8")),
                    label="Checked",
                    lines=2,
                    interactive=False,
                    elem_id="checked",
                )
            with gr.Column():
                which = gr.Dropdown([], label="Image", elem_id="which")
                headline = gr.Textbox(
                    label="Verdict", lines=3, interactive=False, elem_id="verdict"
                )
                preview = gr.Image(label="RGB view of the latents", elem_id="preview")
                heats = gr.Gallery(label="Heat map of each concept", columns=4, elem_id="heats")
                table = gr.Dataframe(headers=list(COLUMNS), label="Concepts", elem_id="table")

        shown = [headline, preview, heats, table]
        judging = [images, which, *shown]
        show.click(lambda *a: _first(*demo.example(*a)), [text, name], judging)
        send.click(lambda *a: _first(*demo.upload(*a)), [text, file, space, scaled], judging)
        if generates:
            make.click(lambda *a: _first(*demo.generate(*a)), [text, prompt, seed, steps], judging)
        which.input(lambda found, at: _view(found[at]), [images, which], shown)
        choice.input(lambda key: shipped[key].read_text("utf-8"), choice, text)
        text.change(demo.check, text, status, show_progress="hidden")
    return blocks


def _first(images: list[Shown], problem: str) -> tuple[Any, ...]:
    """The state, the choice of images, and what the first one shows."""
    names = [(image.name, index) for index, image in enumerate(images)]
    chooser = gr.Dropdown(choices=names, value=0 if names else None)
    if not images:
        return [], chooser, f"NOT JUDGED\n{problem}", None, [], []
    return images, chooser, *_view(images[0])


def _view(image: Shown) -> tuple[Any, ...]:
    return (
        image.headline,
        image.preview,
        list(image.heats),
        [list(row) for row in image.rows],
    )


def serve(blocks: gr.Blocks, host: str, port: int | None, *, wait: bool) -> str:
    """Listen, and say where. Nothing on the page comes from elsewhere."""
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_UPLOAD,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        share=False,
        prevent_thread_lock=not wait,
        quiet=True,
    )
    return str(address)


def main() -> int:
    """The command line."""
    # What generates is shared with the services; it needs diffusers.
    sys.path.append(str(HERE / "serve"))
    generates = find_spec("diffusers") is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if generates:
        from painters import add_choice

        add_choice(parser)
        parser.set_defaults(generator=None)
    runtimes = ("auto", "onnx", "torch")
    parser.add_argument("--runtime", choices=runtimes, default="auto", help="what judges")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    given = parser.parse_args()
    by = None
    if generates:
        from painters import chosen, painter

        given.generator = given.generator or ("diffusers" if given.pipeline else "exact")
        try:
            by = painter(chosen(given))
        except LatentGuardError as error:
            print(f"gradio_app.py: {error}", file=sys.stderr)
            return 2
    print(f"http://{given.host}:{given.port}", flush=True)
    serve(page(Demo(by, given.runtime), generates), given.host, given.port, wait=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
