"""Names to encoders, what is on this machine, fetching, and `latentguard models`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typer
from clip_reference import SMALL_B4, SMALL_B8, Reference
from typer.testing import CliRunner

from latentguard.cli import models
from latentguard.encoders import best_encoder, hub, load_encoder
from latentguard.encoders.catalog import (
    CATALOG,
    bundled_path,
    by_hand_path,
    cache_dir,
    converted_path,
    read_source,
    source_path,
    write_source,
)
from latentguard.encoders.checkpoint import file_sha256
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import ModelError

Write = Callable[..., Path]
BUNDLED = [name for name, entry in CATALOG.items() if entry.bundled]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalog's Latent-CLIPs, shallow and narrow."""
    for name, config in (("latent-clip-b8", SMALL_B8), ("latent-clip-b4-plus", SMALL_B4)):
        monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], config=config))


@pytest.fixture
def by_hand(small: None, reference_b8: Reference, official: Write) -> Path:
    """The official file, put where the error message says."""
    path = by_hand_path("latent-clip-b8")
    path.parent.mkdir(parents=True)
    return Path(shutil.move(official(reference_b8.checkpoint()), path))


# --- names -----------------------------------------------------------------------------------


def test_unknown_names_list_the_alternatives_and_the_closest() -> None:
    with pytest.raises(
        ModelError, match=r"'latent-clip-b-8' \(did you mean latent-clip-b8\?\)"
    ) as e:
        load_encoder("latent-clip-b-8")
    for name in CATALOG:
        assert name in str(e.value)
    with pytest.raises(ModelError, match=r"called '/no/such\.pt': choose from"):
        load_encoder(Path("/no/such.pt"))


def test_a_missing_model_says_how_to_get_it(own_cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_encoder("latent-clip-b4-plus")
    text = str(caught.value)
    assert text.startswith("latent-clip-b4-plus is not on this machine")
    assert "`latentguard models get latent-clip-b4-plus` (2.3 GB)" in text
    assert (
        "https://huggingface.co/wendlerc/latent-clip-b-4-512-plus-34b-80k"
        "/resolve/main/checkpoints/epoch_34.pt" in text
    )
    assert str(own_cache / "models" / "latent-clip-b4-plus.pt") in text
    assert "the bundled nano-view" in text


def test_random_weights_have_no_name() -> None:
    for name in ("random", "latent-clip-b8-random"):
        with pytest.raises(ModelError, match="no model or file is called"):
            load_encoder(name)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_by_name_and_by_path(name: str) -> None:
    path = bundled_path(name)
    if not path.is_file():
        pytest.skip(f"needs {path}, which this checkout does not have")
    space = CATALOG[name].space or "sd1"
    encoder = load_encoder(name, space=space)
    assert (encoder.name, encoder.space) == (name, space)
    assert load_encoder(path, space=space).sha256 == encoder.sha256


# --- from files ------------------------------------------------------------------------------


def test_a_checkpoint_put_there_by_hand_is_used(by_hand: Path) -> None:
    encoder = load_encoder("latent-clip-b8")
    assert isinstance(encoder, LatentCLIP)
    assert (encoder.name, encoder.config) == ("latent-clip-b8", SMALL_B8)
    assert converted_path("latent-clip-b8").is_file()
    by_hand.unlink()
    assert load_encoder("latent-clip-b8").sha256 == encoder.sha256
    # The file itself says what it is, wherever it lies.
    assert load_encoder(str(converted_path("latent-clip-b8"))).sha256 == encoder.sha256


def test_a_checkpoint_in_the_hub_cache_is_used(
    small: None, reference_b8: Reference, official: Write, tmp_path: Path
) -> None:
    entry = CATALOG["latent-clip-b8"]
    repo = tmp_path / "hf" / "hub" / f"models--{str(entry.repo).replace('/', '--')}"
    revision = "0" * 40
    target = repo / "snapshots" / revision / str(entry.file)
    target.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    shutil.move(official(reference_b8.checkpoint()), target)
    assert load_encoder("latent-clip-b8").name == "latent-clip-b8"


def test_a_checkpoint_by_path(small: None, reference_b4: Reference, official: Write) -> None:
    encoder = load_encoder(official(reference_b4.checkpoint()))
    assert (encoder.name, encoder.dim) == ("latent-clip-b4-plus", 640)
    assert not converted_path("latent-clip-b4-plus").exists(), "a path must not install a name"


def test_another_models_checkpoint_is_not_installed(
    small: None, reference_b4: Reference, official: Write
) -> None:
    path = official(reference_b4.checkpoint())
    with pytest.raises(ModelError, match="a checkpoint of latent-clip-b4-plus, not of latent-cl"):
        hub.install("latent-clip-b8", path)
    with pytest.raises(ModelError, match="nano-sdxl is bundled"):
        hub.install("nano-sdxl", path)
    assert not converted_path("latent-clip-b8").exists()


def test_a_converted_file_under_the_wrong_name_is_refused(
    small: None, reference_b4: Reference, official: Write
) -> None:
    path = hub.install("latent-clip-b4-plus", official(reference_b4.checkpoint()))
    path.rename(converted_path("latent-clip-b8"))
    with pytest.raises(ModelError, match="is not latent-clip-b8"):
        load_encoder("latent-clip-b8")


def test_foreign_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"must be latentguard-latent-clip or .*, got 'pt'"):
        load_encoder(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a safetensors file with latentguard's metadata"):
        load_encoder(path)


# --- --model auto ----------------------------------------------------------------------------


def test_the_best_encoder_on_this_machine(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"nano-sdxl", "nano-flux2", "nano-view"}
    located = hub.locate
    monkeypatch.setattr(hub, "locate", lambda name: located(name) or (name in present) or None)
    assert best_encoder("flux2") == "nano-flux2"
    assert best_encoder("sdxl") == "latent-clip-b8"
    by_hand.unlink()
    assert best_encoder("sdxl") == "nano-view"
    assert best_encoder("sd3") == "nano-view"
    with pytest.raises(ModelError, match=r"no encoder reads .* sana .*sdxl.*`latentguard adapt`"):
        best_encoder("sana")


def test_no_encoder_of_a_space_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "locate", lambda name: None)
    with pytest.raises(ModelError, match="latent-clip-b4-plus is not on this machine: fetch it"):
        best_encoder("sdxl")
    with pytest.raises(ModelError, match="bundled model nano-flux2 is missing from this install"):
        best_encoder("flux2")


# --- fetching --------------------------------------------------------------------------------


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment once, when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


GET = """
import sys
from latentguard.cli import app, models
from latentguard.errors import ModelError
models.register(app)
sys.argv = ["latentguard", "models", "get", "latent-clip-b8"]
try:
    app()
except ModelError as error:
    sys.exit(f"latentguard: {error}")
"""


def test_without_network_the_error_says_what_to_do(own_cache: Path) -> None:
    done = in_a_process(GET, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    (text,) = [line for line in done.stderr.splitlines() if line.startswith("latentguard:")]
    assert "latent-clip-b8 could not be fetched from https://huggingface.co/wendlerc/" in text
    assert "download https://huggingface.co/wendlerc/latent-clip-b-8-512-34b-80k/resolve" in text
    assert f"put it at {own_cache / 'models' / 'latent-clip-b8.pt'}" in text
    assert text.endswith("or use the bundled nano-view")


@pytest.fixture
def server(reference_b8: Reference, official: Write) -> Iterator[Any]:
    """A model hub of one file on this machine."""
    data = official(reference_b8.checkpoint(), "served.pt").read_bytes()
    entry = CATALOG["latent-clip-b8"]
    paths = [f"/{entry.repo}/resolve/{of}/{entry.file}" for of in ("main", "1" * 40)]
    digest = hashlib.sha256(data).hexdigest()

    class Hub(BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []
        etag = digest

        def do_HEAD(self) -> None:
            self.send_response(200 if self.path in paths else 404)
            self.send_header("Content-Length", str(len(data) if self.path in paths else 0))
            self.send_header("ETag", f'"{Hub.etag}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            Hub.asked.append(self.path)
            if self.path in paths:
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.hub = Hub  # type: ignore[attr-defined]
        yield running
        running.shutdown()


@pytest.fixture
def get(small: None, server: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`latentguard models get latent-clip-b8` from that hub, with further arguments."""
    shrink = f"""
from dataclasses import replace
from latentguard.encoders.catalog import CATALOG, LatentClipConfig
config = LatentClipConfig(**{SMALL_B8.to_dict()!r})
CATALOG["latent-clip-b8"] = replace(CATALOG["latent-clip-b8"], config=config)
"""

    def run(*arguments: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
        more = GET.replace('"latent-clip-b8"]', f'"latent-clip-b8", *{arguments!r}]')
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return in_a_process(
            shrink + more, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=offline, NO_PROXY="127.0.0.1"
        )

    return run


def test_fetching_downloads_converts_and_tidies_up(
    get: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = get()
    assert done.returncode == 0, done.stderr
    assert f"installed at {converted_path('latent-clip-b8')}" in done.stderr
    assert not (cache_dir() / "downloads" / "latent-clip-b8").exists()
    assert load_encoder("latent-clip-b8").dim == 512
    again = get(offline="1")
    assert again.returncode == 0, again.stderr
    assert "is already here" in again.stderr


@pytest.mark.slow
def test_a_download_is_of_one_commit_and_of_the_digest_that_is_published(
    get: Callable[..., subprocess.CompletedProcess[str]], server: Any
) -> None:
    right, server.hub.etag = server.hub.etag, "0" * 64
    refused = get()
    assert refused.returncode == 1
    assert f"has SHA-256 {right}, not the expected {'0' * 64}" in refused.stderr
    assert not converted_path("latent-clip-b8").exists()
    server.hub.etag = right
    assert get().returncode == 0
    files = [path for path in server.hub.asked if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{'1' * 40}/" in path for path in files), files
    record = read_source("latent-clip-b8")
    assert record is not None
    assert (record.revision, record.sha256) == ("1" * 40, right)


@pytest.mark.slow
def test_what_was_fetched_first_is_what_is_fetched_again(
    get: Callable[..., subprocess.CompletedProcess[str]], server: Any
) -> None:
    server.hub.etag = "no digest"
    assert get().returncode == 0
    record = read_source("latent-clip-b8")
    assert record is not None
    write_source("latent-clip-b8", replace(record, sha256="a" * 64))
    changed = get("--force")
    assert changed.returncode == 1
    assert f"not the expected {'a' * 64}" in changed.stderr
    source_path("latent-clip-b8").write_text("{}")
    with pytest.raises(ModelError, match="is no record of where latent-clip-b8 was fetched from"):
        read_source("latent-clip-b8")


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def run() -> Callable[..., Any]:
    app = typer.Typer()
    models.register(app)

    @app.callback()
    def root() -> None:
        """A second command, so that `models` keeps its name."""

    return lambda *args: CliRunner().invoke(app, ["models", *args])


def test_list_says_what_is_here(by_hand: Path, run: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--format", "json").stdout)}
    assert list(rows) == list(CATALOG)
    assert rows["latent-clip-b8"]["state"] == "yes, not converted yet"
    assert rows["latent-clip-b8"]["path"] == str(by_hand)
    assert rows["latent-clip-b4-plus"]["state"] == "no"
    assert rows["latent-clip-b4-plus"]["path"] is None
    encoder = load_encoder("latent-clip-b8")
    rows = {row["name"]: row for row in json.loads(run("list", "--format", "json").stdout)}
    assert rows["latent-clip-b8"]["state"] == "yes"
    assert rows["latent-clip-b8"]["sha256"] == encoder.sha256
    table = run("list").stdout
    assert encoder.sha256[:12] in table
    assert "2.3 GB" in table


@pytest.mark.parametrize("name", BUNDLED)
def test_list_and_the_encoder_state_the_same_digest(name: str, run: Callable[..., Any]) -> None:
    if not bundled_path(name).is_file():
        pytest.skip(f"needs {bundled_path(name)}, which this checkout does not have")
    rows = {row["name"]: row for row in json.loads(run("list", "--format", "json").stdout)}
    assert rows[name]["state"] == "bundled"
    space = CATALOG[name].space or "sd1"
    assert rows[name]["sha256"] == load_encoder(name, space=space).sha256


def test_get_from_a_file_and_show(
    small: None, reference_b8: Reference, official: Write, run: Callable[..., Any]
) -> None:
    path = official(reference_b8.checkpoint())
    done = run("get", "latent-clip-b8", "--from", str(path))
    assert done.exit_code == 0, done.output
    shown = json.loads(run("show", "latent-clip-b8", "--format", "json").stdout)
    assert shown["config"] == SMALL_B8.to_dict()
    assert shown["source_sha256"] == file_sha256(path)
    assert shown["path"] == str(converted_path("latent-clip-b8"))
    assert shown["sha256"] in run("show", str(converted_path("latent-clip-b8"))).stdout


def test_get_of_a_bundled_model_has_nothing_to_do(run: Callable[..., Any]) -> None:
    done = run("get", "nano-flux2")
    assert done.exit_code == 0
    assert "nothing to fetch" in done.output


def test_listing_imports_no_torch() -> None:
    code = """
import sys
from latentguard.cli import app, models
models.register(app)
sys.argv = ["latentguard", "models", "list"]
try:
    app()
except SystemExit as done:
    assert not done.code, done.code
heavy = [name for name in ("torch", "open_clip", "transformers") if name in sys.modules]
assert not heavy, heavy
"""
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
