"""`latentguard scan`: exit codes, JSON lines, CSV, the table, and what it refuses to write over."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scan_helpers import ALWAYS, NEVER, latents_of, write_latents

from latentguard.judge import Verdict
from latentguard.policy import load_policy
from latentguard.scan import Scan
from latentguard.spaces import Latents

KEYS = {
    "source",
    "index",
    "id",
    "space",
    "schema_version",
    "decision",
    "reason",
    "error",
    "noise_level",
    "concepts",
    "model",
    "policy",
}


@pytest.mark.parametrize(
    ("action", "fail_on", "code"),
    [
        (None, "block", 0),
        pytest.param(None, "review", 0, marks=pytest.mark.slow),
        pytest.param("observe", "review", 0, marks=pytest.mark.slow),
        ("review", "block", 0),
        ("review", "review", 1),
        pytest.param("review", "never", 0, marks=pytest.mark.slow),
        pytest.param("steer", "block", 1, marks=pytest.mark.slow),
        ("block", "block", 1),
        pytest.param("block", "review", 1, marks=pytest.mark.slow),
        pytest.param("block", "never", 0, marks=pytest.mark.slow),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    policy: Callable[..., Path],
    command: Any,
    action: str | None,
    fail_on: str,
    code: int,
) -> None:
    file = write_latents(tmp_path / "a.pt", 2)
    rules = policy(
        ("revolver", action or "block", ALWAYS if action else NEVER),
        ("wine bottle", "block", NEVER),
    )
    ran = command("scan", file, "--policy", rules, "--fail-on", fail_on, "--format", "json")
    assert ran.code == code
    assert len(ran.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("action", "fail_on"),
    [
        ("observe", "never"),
        ("block", "block"),
        *(
            pytest.param(action, fail_on, marks=pytest.mark.slow)
            for action, fail_on in [
                *(("observe", "block"), ("observe", "review")),
                *(("block", "review"), ("block", "never")),
            ]
        ),
    ],
)
def test_unreadable_input_is_3_and_wins(
    tmp_path: Path, policy: Callable[..., Path], command: Any, action: str, fail_on: str
) -> None:
    good, bad = write_latents(tmp_path / "good.pt", 1), tmp_path / "bad.pt"
    bad.write_bytes(b"no latents")
    rules = policy(("revolver", action, ALWAYS))
    ran = command("scan", bad, good, "--policy", rules, "--fail-on", fail_on, "--format", "json")
    assert ran.code == 3
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [record["source"] for record in records] == [str(bad), str(good)]
    assert records[0]["decision"] == "block"
    assert records[0]["error"]
    assert records[0]["model"] is None
    assert records[1]["error"] is None


def test_a_path_that_does_not_exist_is_an_input_that_cannot_be_read(
    tmp_path: Path, calm: Path, command: Any
) -> None:
    for path in (tmp_path / "missing.pt", tmp_path / "*.safetensors"):
        ran = command("scan", path, "--policy", calm, "--format", "json")
        assert ran.code == 3
        (record,) = map(json.loads, ran.out.splitlines())
        assert (record["source"], record["decision"]) == (str(path), "block")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert command("scan", empty, "--policy", calm).code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--fail-on", "sometimes"),
        ("--policy", "no-such-policy"),
        ("--model", "no-such-model"),
        ("--model", "latent-clip-b8"),
        ("--space", "sdxxl"),
        ("--model", "nano-flux2", "--space", "sdxl"),
        ("--device", "tpu9000"),
        ("--batch-size", "0"),
        ("--heatmap",),
        ("--report", "report.pt"),
        ("--report", "no/such/folder/report.html"),
        ("--output", "a.pt"),
        ("--output", "."),
        ("--no-such-option",),
    ],
    ids=lambda arguments: " ".join(arguments) or "no paths",
)
def test_wrong_usage_is_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
    calm: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    write_latents(tmp_path / "a.pt", 1)
    before = (tmp_path / "a.pt").read_bytes()
    paths = ("a.pt",) if arguments else ()
    rules = () if "--policy" in arguments else ("--policy", str(calm))
    ran = command("scan", *paths, *(rules if arguments else ()), *arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert (tmp_path / "a.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "calm.yaml"]


@pytest.mark.parametrize("target", ["./a.pt", "link", "link.txt", "hard.txt"])
def test_latents_of_another_name_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, calm: Path, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_latents(tmp_path / "a.pt", 1)
    before = (tmp_path / "a.pt").read_bytes()
    for name in ("link", "link.txt"):
        os.symlink("a.pt", tmp_path / name)
    os.link(tmp_path / "a.pt", tmp_path / "hard.txt")
    ran = command("scan", "a.pt", "--policy", calm, "--output", target)
    assert ran.code == 2
    assert "would write over latents" in ran.err
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_model_that_cannot_see_the_policy_is_2(
    tmp_path: Path, policy: Callable[..., Path], command: Any
) -> None:
    rules = policy(("revolver", "block", NEVER), ("nazi rally", "block", NEVER), uncovered="error")
    ran = command("scan", write_latents(tmp_path / "a.pt", 1), "--policy", rules)
    assert ran.code == 2
    assert "nazi-rally" in ran.err
    assert len(ran.err.strip().splitlines()) <= 2  # the note on the model, the error


def test_a_file_without_images_is_not_a_pass(tmp_path: Path, calm: Path, command: Any) -> None:
    file = tmp_path / "empty.pt"
    torch.save({"latents": [], "space": "flux2", "scaled": True}, file)
    assert command("scan", file, "--policy", calm).code in (2, 3)


def test_json_lines(tmp_path: Path, policy: Callable[..., Path], command: Any) -> None:
    names = ["plain", "späte Ärzte \u202e", "\x1b[31mred"]
    file = write_latents(tmp_path / "a.pt", 3, ids=names)
    rules = policy(("revolver", "review", ALWAYS), ("wine bottle", "block", NEVER))
    ran = command("scan", file, "--policy", rules, "--format", "json")
    assert ran.out.isascii()
    assert "\x1b" not in ran.out
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [record["id"] for record in records] == names
    assert [record["index"] for record in records] == [0, 1, 2]
    loaded = load_policy(rules)
    for record in records:
        assert set(record) == KEYS
        assert record["schema_version"] == 1
        assert record["decision"] == "review"
        assert record["policy"] == {"name": "made", "version": "7", "sha256": loaded.sha256}
        assert record["model"]["name"] == "nano-flux2"
        assert len(record["model"]["sha256"]) == 64
        assert record["noise_level"] == 0
        assert [c["id"] for c in record["concepts"]] == ["revolver", "wine-bottle"]
        assert Verdict.from_dict(record).to_dict()["reason"] == record["reason"]
    assert "3 images: 0 allowed, 3 review, 0 blocked, 0 errors" in ran.err


def test_csv_is_one_row_per_image(
    tmp_path: Path, policy: Callable[..., Path], command: Any
) -> None:
    names = ['=HYPERLINK("https://example.org")', "plain", "two\nlines"]
    good, bad = write_latents(tmp_path / "a.pt", 3, ids=names), tmp_path / "missing.pt"
    rules = policy(("revolver", "block", ALWAYS), ("nazi rally", "block", NEVER))
    ran = command("scan", good, bad, "--policy", rules, "--format", "csv", "--quiet")
    assert ran.code == 3
    assert ran.err == ""
    rows = list(csv.DictReader(io.StringIO(ran.out, newline="")))
    assert [row["decision"] for row in rows] == ["block"] * 4
    assert [row["id"] for row in rows] == [
        '\'=HYPERLINK("https://example.org")',
        "plain",
        "two\\x0alines",
        "",
    ]
    assert rows[0]["concept"] == rows[0]["matched"] == "revolver"
    assert rows[0]["unit"] == "margin"
    assert float(rows[0]["score"]) >= float(rows[0]["threshold"]) == -2.0
    assert rows[0]["not_checked"] == "nazi-rally"
    assert 0 < float(rows[0]["p:revolver"]) < 1
    assert rows[0]["p:nazi-rally"] == ""
    assert rows[3]["error"] == "does not exist"
    assert rows[3]["model"] == rows[3]["score"] == ""


def test_the_table_says_what_was_decided_and_why(
    tmp_path: Path, policy: Callable[..., Path], command: Any
) -> None:
    file = write_latents(tmp_path / "a.pt", 2, ids=["first", "[red]second[/red]"])
    rules = policy(
        ("revolver", "block", ALWAYS), ("wine bottle", "review", ALWAYS), ("nazi rally", "block", 1)
    )
    ran = command("scan", file, tmp_path / "missing.pt", "--policy", rules)
    assert ran.code == 3
    lines = ran.out.splitlines()
    (first,) = [line for line in lines if "first" in line]
    assert "✕ block" in first
    assert "revolver +1" in first
    assert "≥ -2.000" in first
    assert "matches revolver" in first
    assert any("[red]second[/red]" in line for line in lines)
    assert any("does not exist" in line and "? block" in line for line in lines)
    assert "1 concept was not checked, as nano-flux2 cannot see it: nazi-rally" in ran.out
    assert "3 images: 0 allowed, 0 review, 2 blocked, 1 error" in lines[-1]
    assert "policy made 7" in lines[-1]
    assert "\x1b" not in ran.out + ran.err


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with latents, and with files that hold none."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_latents(folder / "a.pt", 1)
    for name in ("a.json", "b.json", "readme.md"):
        (folder / name).write_text("{}")
    return folder


def test_what_is_passed_over_is_counted_and_named(mixed: Path, calm: Path, command: Any) -> None:
    said = (
        "passed over, because they are not latents: 3 files (.json 2, .md 1); the first files: "
        "a.json, b.json, readme.md"
    )
    table = command("scan", mixed, "--policy", calm)
    assert (table.code, table.out.splitlines()[-2]) == (0, said)
    report = mixed.parent / "report.html"
    lines = command("scan", mixed, "--policy", calm, "--format", "json", "--report", report)
    assert (lines.code, len(lines.out.splitlines())) == (0, 1)
    assert said in lines.err.splitlines()
    assert said in report.read_text(encoding="utf-8")
    assert said not in command("scan", mixed, "--policy", calm, "--quiet").out
    run = Scan(mixed, calm)
    assert len(list(run)) == 1
    assert run.passed.files == {".json": 2, ".md": 1}


def test_a_file_that_could_hold_latents_is_not_passed_over(
    mixed: Path, calm: Path, command: Any
) -> None:
    (mixed / "latents.ckpt").write_bytes(b"x")
    ran = command("scan", mixed, "--policy", calm, "--format", "json")
    assert ran.code == 3
    good, failed = (json.loads(line) for line in ran.out.splitlines())
    assert failed["source"] == str(mixed / "latents.ckpt")
    assert failed["decision"] == "block"
    assert "could hold latents, but its type cannot be read" in failed["error"]
    assert good["error"] is None


@pytest.mark.slow
def test_options_that_say_what_files_do_not(tmp_path: Path, calm: Path, command: Any) -> None:
    """README's recipe, a shard of other names, and what --strict makes of a caption."""
    said = ("--space", "flux2", "--scaled", "--policy", calm, "--format", "json")
    latents = Latents(latents_of(1), "flux2", True)
    np.save(tmp_path / "latents.npy", latents.to_packed().tensor.float().cpu().numpy())
    size = ("--layout", "packed", "--pixels", "--height", "128", "--width", "128")
    ran = command("scan", tmp_path / "latents.npy", *said, *size)
    assert (ran.code, json.loads(ran.out)["error"]) == (0, None)
    buffer = io.BytesIO()
    np.savez(buffer, x=latents.tensor.numpy(), y=latents.tensor.numpy())
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("0.clean.npz", "0.noisy.npz"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            shard.addfile(member, io.BytesIO(buffer.getvalue()))
    options = ("--member", "clean.npz", "--key", "x")
    ran = command("scan", tmp_path / "a.tar", *said, *options)
    assert (ran.code, json.loads(ran.out)["id"]) == (0, "0")
    assert "1 other array (--key), 1 other shard member (--member)" in ran.err
    assert command("scan", tmp_path / "a.tar", *said).code == 3
    (tmp_path / "a.tar").unlink()
    np.savez(tmp_path / "a.npz", x=latents.tensor.numpy(), y=latents.tensor.numpy())
    (tmp_path / "a.txt").write_text("a cat")
    ran = command("scan", tmp_path / "a.npz", *said, *options)
    assert ran.code == 0
    assert "skipped on request: 1 other array (--key)" in ran.err
    (tmp_path / "latents.npy").unlink()
    assert command("scan", tmp_path, *said, *options).code == 0
    assert command("scan", tmp_path, *said, *options, "--strict").code == 3
    assert command("scan", tmp_path, *said, "--dequantize", "1").code == 2


def test_output_and_report_go_to_files(tmp_path: Path, calm: Path, command: Any) -> None:
    file = write_latents(tmp_path / "a.pt", 2, side=32)
    output, report = tmp_path / "out.jsonl", tmp_path / "report.html"
    ran = command(
        "scan", file, "--policy", calm, "--format", "json", "--output", output, "--report", report,
        "--heatmap",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.out == ""
    assert f"report: {report}" in ran.err
    assert len(output.read_text(encoding="ascii").splitlines()) == 2
    page = report.read_text(encoding="utf-8")
    assert page.count('<article class="card') == 2
    assert 'class="heat h1"' in page
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    table = command("scan", file, "--policy", calm, "--output", tmp_path / "table.txt", "-q")
    assert (table.code, table.out, table.err) == (0, "", "")
    assert "allow" in (tmp_path / "table.txt").read_text(encoding="utf-8")


def test_space_and_scaling_answer_what_a_file_leaves_open(
    tmp_path: Path, calm: Path, command: Any
) -> None:
    file = tmp_path / "bare.pt"
    torch.save(latents_of(1, channels=32) * 0.01, file)  # no statistics of real latents
    asked = command("scan", file, "--policy", calm, "--format", "json")
    assert asked.code == 3
    assert json.loads(asked.out)["error"]
    told = command(
        "scan", file, "--policy", calm, "--format", "json", "--space", "flux2", "--scaled"
    )
    assert told.code == 0
    assert json.loads(told.out)["space"] == "flux2"


def _process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    code = "from latentguard.cli import main; main()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # A shell's background job ignores SIGINT, and so would its children: as in a terminal instead.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **streams)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_away_is_not_a_match(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.pt", 64)
    process = _process("scan", file, "--policy", calm, "--format", "json", "--batch-size", 1)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'{"source"')
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=600) == 141
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_a_reader_of_the_table_that_goes_away_is_not_a_match(tmp_path: Path, calm: Path) -> None:
    process = _process("scan", write_latents(tmp_path / "a.pt", 1), "--policy", calm)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 141
    assert b"Traceback" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ("scan", "a.pt", "--policy", "calm.yaml", "-q", "--format", "json"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("scan", "a.pt", "--policy", "calm.yaml"), marks=pytest.mark.slow),
        ("policy", "schema"),
    ],
    ids=lambda arguments: " ".join(arguments[:2] + arguments[-1:]),
)
def test_a_full_disk_is_one_line(tmp_path: Path, calm: Path, arguments: tuple[str, ...]) -> None:
    write_latents(tmp_path / "a.pt", 1)
    with open("/dev/full", "w") as full:
        process = _process(*arguments, stdout=full, cwd=tmp_path)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    lines = errors.decode().splitlines()
    assert lines[-1].endswith("the output: No space left on device")
    assert not any("Traceback" in line or "Exception ignored" in line for line in lines)


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [
        pytest.param("cp437", ("scan", "a.pt"), marks=pytest.mark.slow),
        ("cp437", ("doctor",)),
        ("ascii", ("policy", "show")),
    ],
)
def test_consoles_without_our_signs_get_other_ones(
    tmp_path: Path, policy: Callable[..., Path], encoding: str, arguments: tuple[str, ...]
) -> None:
    write_latents(tmp_path / "a.pt", 1, ids=["нож ✓"])
    odd = policy(("revolver", "block", ALWAYS))
    odd.write_text(odd.read_text().replace("[dog]", "[нож]").replace("[revolver]", "[revolver ✓]"))
    if arguments[0] != "doctor":
        arguments += ("--policy", str(odd)) if arguments[0] == "scan" else (str(odd),)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "60"}
    process = _process(*arguments, cwd=tmp_path, env=environment)
    out, errors = process.communicate(timeout=120)
    assert b"Traceback" not in errors
    assert process.returncode == (1 if arguments[0] == "scan" else 0), errors
    if arguments[0] == "scan":
        assert "x block" in out.decode(encoding)
        assert "\\u043d" in out.decode(encoding)


def test_an_interrupted_scan_is_not_a_match(tmp_path: Path, calm: Path) -> None:
    file = write_latents(tmp_path / "a.pt", 512, side=8)
    process = _process("scan", file, "--policy", calm, "--format", "json", "--batch-size", 1)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"interrupted after" in errors
    assert b"Traceback" not in errors


@pytest.mark.slow
def test_the_progress_bar_is_for_terminals(tmp_path: Path, calm: Path) -> None:
    """On a terminal's standard error only, and standard output holds nothing but records."""
    file = write_latents(tmp_path / "a.pt", 4)
    ours, theirs = pty.openpty()
    process = _process("scan", file, "--policy", calm, "--format", "json", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait(timeout=600) == 0
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert b"/s" in shown
    assert b"\x1b[" in shown
    assert b"4 images: 4 allowed" in shown


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['latentguard', 'scan', '--help']\n"
        "from latentguard.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0
    for option in ("--fail-on", "--report", "--heatmap", "--unscaled", "Exit codes"):
        assert option in done.stdout
