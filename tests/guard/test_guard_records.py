"""What is left of a call: verdicts, history, plot, JSON, audit log, metrics, logging."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from audit_writer import write_many
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY, XL, blocking, guarded

from latentguard import LatentGuard, Latents, Scorer
from latentguard.encoders import load_encoder
from latentguard.errors import LatentsError
from latentguard.guard import AuditLog, Session
from latentguard.guard.plot import plot
from latentguard.judge import SCHEMA_VERSION, Verdict
from latentguard.policy.lock import Lock
from latentguard.policy.models import Threshold


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which no standard knows."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in path.read_text().splitlines()]


def latents(count: int = 2, seed: int = 0) -> Latents:
    tensor = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Latents(tensor, "sdxl", True)


def mixed(count: int = 4, steps: int = 4, **options: Any) -> LatentGuard:
    """A guard, after a call of which some images were blocked at the first step, and some not."""
    pipe = small.sdxl()
    probe = LatentGuard(policy(action="observe"), XL)
    pipe(**small.sdxl_arguments(count, steps), callback_on_step_end=probe)
    scores = sorted(v.concepts[0].probability for v in probe.history[0].verdicts if v)
    guard = LatentGuard(policy(sum(scores[1:3]) / 2), XL, **options)
    pipe(**small.sdxl_arguments(count, steps), callback_on_step_end=guard)
    assert {verdict.decision for verdict in guard.verdicts} == {"allow", "block"}
    return guard


# -- verdicts and history ----------------------------------------------------------------------


def test_before_the_first_call_there_is_nothing() -> None:
    guard = blocking()
    assert (guard.verdicts, guard.history, guard.last) == ([], [], None)
    for what in (guard.to_json, guard.plot):
        with pytest.raises(LatentsError, match="has not seen a call yet"):
            what()


def test_history_has_each_step_with_all_that_was_done() -> None:
    guard = mixed()
    history = guard.history
    assert [record.step for record in history] == [0, 1, 2, 3]
    assert [record.final for record in history] == [False] * 3 + [True]
    assert [record.estimate_source for record in history] == ["scheduler"] * 3 + ["latents"]
    levels = [record.noise_level for record in history]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == 0
    for i, verdict in enumerate(guard.verdicts):
        actions = [record.actions[i] for record in history]
        if verdict.decision == "block":
            assert actions == ["blocked"] + ["already blocked"] * 3
            assert [record.verdicts[i] for record in history] == [verdict, None, None, None]
            assert verdict.noise_level == levels[0]
            assert verdict.reason.startswith("block: concept 'guns' matched 'revolver'")
        else:
            assert actions == ["none"] * 4
            assert history[-1].verdicts[i] == verdict
    assert all(record.seconds > 0 for record in history)


def test_a_second_call_takes_the_place_of_the_first() -> None:
    guard = LatentGuard(policy(NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(1, steps=4))
    first = guard.last
    pipe(**small.sdxl_arguments(3, steps=2))
    assert guard.last is not first
    assert len(guard.verdicts) == 3
    assert len(guard.history) == 2
    assert first is not None
    assert len(first.history) == 4  # who kept it still has it


def test_a_call_that_failed_is_told_of_too() -> None:
    def fails(pipe: Any, index: int, timestep: Any, given: Any) -> Any:
        if index == 1:
            raise RuntimeError("mine")
        return given

    guard = LatentGuard(policy(NEVER), XL)
    with pytest.raises(RuntimeError, match="mine"):
        guarded(guard)(**small.sdxl_arguments(), callback_on_step_end=fails)
    assert [record.final for record in guard.history] == [False, False]
    assert guard.verdicts[0].decision == "block"
    assert "the final latents were never scored" in guard.verdicts[0].reason
    assert guard.last is not None
    assert not guard.last.finished


# -- JSON and the plot -------------------------------------------------------------------------


def test_to_json_has_all_of_it(tmp_path: Path) -> None:
    guard = mixed()
    text = guard.to_json(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == text + "\n"
    data = strict(text)
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["policy_sha256"] == guard.policy.sha256
    assert data["model_sha256"] == XL.sha256
    assert (data["policy"], data["model"], data["space"]) == ("test", "linear", "sdxl")
    assert [Verdict.from_dict(item) for item in data["verdicts"]] == guard.verdicts
    for record, found in zip(guard.history, data["history"], strict=True):
        assert found == strict(json.dumps(record.to_dict()))
        for image, verdict in zip(found["images"], record.verdicts, strict=True):
            given = image["verdict"]
            assert (None if given is None else Verdict.from_dict(given)) == verdict


def test_steering_is_in_the_record() -> None:
    rule = policy(ALWAYS, "steer", concept="steer: {iterations: 2}")
    guard = LatentGuard(rule, XL)
    guarded(guard)(**small.sdxl_arguments())
    first, *_, last = strict(guard.to_json())["history"]
    assert first["images"][0]["action"] == "steered"
    assert first["images"][0]["steering"]["concept"] == "guns"
    assert first["images"][0]["steering"]["iterations"] == 2
    assert last["images"][0]["action"] == "blocked"


def test_what_is_not_finite_is_null_in_json() -> None:
    session = Session(Scorer(policy(), XL))
    broken = latents()
    broken.tensor[1] = math.nan
    session.step(broken, noise_level=math.inf)
    data = strict(json.dumps(session.to_dict()))
    assert data["history"][0]["noise_level"] is None
    assert data["verdicts"][1]["noise_level"] is None
    assert "not finite" in data["verdicts"][1]["error"]


def test_the_plot_shows_the_scores_the_threshold_and_what_was_done(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    guard = mixed()
    figure = guard.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = figure.axes
    assert panel.get_title(loc="left") == "guns"
    left, right = panel.get_xlim()
    assert left > guard.history[0].noise_level > 0 >= right  # from noise to clean
    by_label = {line.get_label(): line for line in panel.lines}
    limit = guard.policy.concepts[0].threshold.probability
    for i, verdict in enumerate(guard.verdicts):
        line = by_label[f"image {i}"]
        scored = [(r.noise_level, r.verdicts[i]) for r in guard.history if r.verdicts[i]]
        assert list(line.get_xdata()) == [level for level, _ in scored]
        assert list(line.get_ydata()) == [v.concepts[0].probability for _, v in scored if v]
        assert len(scored) == (1 if verdict.decision == "block" else 4)
    dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert {y for line in dashed for y in line.get_ydata()} == {limit}
    crosses = [line for line in panel.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == sum(verdict.decision == "block" for verdict in guard.verdicts)


def test_a_call_without_scores_cannot_be_plotted() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    guard = LatentGuard(policy(), XL)
    guarded(guard)(**small.sdxl_arguments(), latents=torch.full((1, 4, 8, 8), math.nan))
    with pytest.raises(LatentsError, match="no step of this session has scores"):
        guard.plot()


def test_a_block_on_pure_noise_is_plotted_at_the_left_edge() -> None:
    """As FLUX and SD3 begin: an infinite noise-to-signal ratio."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    session = Session(Scorer(policy(ALWAYS), XL))
    session.step(latents(1), noise_level=math.inf)
    (panel,) = plot(session).axes
    crosses = [line for line in panel.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 1
    left, right = panel.get_xlim()
    assert left > crosses[0].get_xdata()[0] > right


def test_a_rate_that_is_not_judged_yet_has_no_threshold_in_the_plot() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    rule = policy(concept="noise_window: [0, 1]")
    concept = rule.concepts[0].model_copy(update={"threshold": Threshold(fpr=0.01)})
    entry = {
        "model": XL.name,
        "model_sha256": XL.sha256,
        "space": "sdxl",
        "concept": "guns",
        "noise_level": 0.0,
        "prompts_sha256": rule.prompts_sha256(concept),
        "margins": [{"fpr": 0.01, "margin": 0.9}],
    }
    rule = rule.model_copy(update={"concepts": (concept,)})
    rule._lock = Lock.model_validate({"schema_version": 1, "entries": [entry]})
    session = Session(Scorer(rule, XL))
    session.step(latents(1), noise_level=4.0)
    with pytest.raises(LatentsError, match="no step of this session has scores"):
        plot(session)
    session.step(latents(1), noise_level=0.0, final=True)
    (panel,) = plot(session).axes
    (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    first, last = dashed.get_ydata()
    assert math.isnan(first)
    assert last == pytest.approx(1 / (1 + math.exp(-XL.logit_scale * 0.9)))


def test_the_threshold_of_a_cascade_is_that_of_the_model_which_judged() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    found = {}
    for unsure in (1e-9, 2):  # sure of everything, and of nothing
        rule = policy(extra=f"cascade: {{first: nano-flux2, unsure: {unsure}}}")
        concept = rule.concepts[0].model_copy(update={"threshold": Threshold(margin=0.05)})
        rule = rule.model_copy(update={"concepts": (concept,)})
        session = Session(Scorer(rule, LinearEncoder("flux2", 32)))
        generator = torch.Generator().manual_seed(0)
        given = Latents(torch.randn(1, 32, 8, 8, generator=generator), "flux2", True)
        session.step(given, noise_level=0.0, final=True)
        (panel,) = plot(session).axes
        (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
        (found[unsure],) = dashed.get_ydata()
    scales = {1e-9: load_encoder("nano-flux2", "cpu").logit_scale, 2: 10.0}
    for unsure, scale in scales.items():
        expected = 1 / (1 + math.exp(-scale * 0.05))
        assert found[unsure] == pytest.approx(expected, rel=1e-3)


# -- the audit log -----------------------------------------------------------------------------


def test_a_line_for_each_image_and_step(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    guard = mixed(audit=AuditLog(path, extra={"tenant": "a"}, sync=True))
    lines = [line for line in lines_of(path) if "step" in line]
    kept = sum(verdict.decision == "allow" for verdict in guard.verdicts)
    assert len(lines) == 4 + 3 * kept  # a blocked image is judged no more
    assert guard.last is not None
    for line in lines:
        assert line["schema_version"] == SCHEMA_VERSION
        assert line["request_id"] == guard.last.request_id
        assert line["policy_sha256"] == guard.policy.sha256
        assert line["model_sha256"] == XL.sha256
        assert line["extra"] == {"tenant": "a"}
        verdict = guard.history[line["step"]].verdicts[line["image"]]
        assert Verdict.from_dict(line) == verdict
        assert line["action"] == guard.history[line["step"]].actions[line["image"]]
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_are_only_ever_appended(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"from": "before"}\n')
    pipe = guarded(LatentGuard(policy(NEVER), XL, audit=path))
    before = b""
    for _ in range(2):
        pipe(**small.sdxl_arguments())
        after = path.read_bytes()
        assert after.startswith(before)
        assert len(after) > len(before)
        before = after
    assert lines_of(path)[0] == {"from": "before"}


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_of_users_only_where_they_are_asked_for(tmp_path: Path, asked: bool) -> None:
    path = tmp_path / "audit.jsonl"
    guard = LatentGuard(policy(NEVER), XL, audit=AuditLog(path, prompts=asked))
    pipe = guarded(guard)
    pipe.encode_prompt = _embeds(pipe)
    arguments = {k: v for k, v in small.sdxl_arguments().items() if "embeds" not in k}
    pipe(["a private wish", "another"], **arguments, num_images_per_prompt=2)
    text = path.read_text()
    assert ("private" in text) == asked
    assert "private" not in guard.to_json()
    if asked:
        final = [line for line in lines_of(path) if line["final"]]
        prompts = ["a private wish"] * 2 + ["another"] * 2
        assert [line["prompt"] for line in final] == prompts
        pipe(**small.sdxl_arguments())
        assert lines_of(path)[-1]["prompt"] is None


def _embeds(pipe: Any) -> Any:
    """A text encoder that knows no words: none can be fetched."""

    def encode(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        given = small.sdxl_arguments(len(prompt) if isinstance(prompt, list) else 1)
        repeats = kwargs["num_images_per_prompt"]
        names = ("", "negative_", "pooled_", "negative_pooled_")
        order = (names[0], names[1], names[2], names[3])
        return tuple(given[f"{n}prompt_embeds"].repeat_interleave(repeats, 0) for n in order)

    return encode


def test_extra_that_is_no_json_is_refused_at_once(tmp_path: Path) -> None:
    for extra in ({"when": object()}, {"share": math.nan}):
        with pytest.raises((TypeError, ValueError)):
            AuditLog(tmp_path / "audit.jsonl", extra=extra)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        LatentGuard(policy(), XL, audit=tmp_path / "file" / "audit.jsonl")
    with pytest.raises(IsADirectoryError):
        LatentGuard(policy(), XL, audit=tmp_path)


def test_threads_and_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    # Spawned, not forked: OpenMP's threads do not survive a fork, and a child that waits for one
    # waits for ever. Daemons, so that a child that hangs ends with the tests.
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=write_many, args=(path, f"process-{i}", 50), daemon=True)
        for i in range(2)
    ]
    threads = [
        threading.Thread(target=write_many, args=(path, f"thread-{i}", 50), daemon=True)
        for i in range(2)
    ]
    for one in (*processes, *threads):
        one.start()
    for one in (*processes, *threads):
        one.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    found: dict[str, list[tuple[int, int]]] = {}
    for line in lines_of(path):
        found.setdefault(line["extra"]["writer"], []).append((line["step"], line["image"]))
    assert len(found) == 4
    for steps in found.values():  # none is lost, and each writer's are in order
        assert steps == [(step, image) for step in range(50) for image in range(3)]


@contextlib.contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size: what is written ends there, as on a disk
    that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("action", ["block", "observe"])
def test_a_disk_that_is_full_ends_the_call(tmp_path: Path, action: str) -> None:
    path = tmp_path / "audit.jsonl"
    guard = LatentGuard(policy(NEVER, action, extra="on_error: allow"), XL, audit=path)
    pipe = guarded(guard)
    with full_at(1000), pytest.raises(OSError, match=r"bytes were written|too large"):
        pipe(**small.sdxl_arguments())
    assert path.stat().st_size == 1000
    whole = path.read_text().count("\n")
    assert pipe(**small.sdxl_arguments()).images.any()  # and works again where there is space
    lines = path.read_text().splitlines()
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[whole])  # half a line, which took no other with it
    assert [json.loads(line)["step"] for line in lines[whole + 1 :]] == [0, 1, 2, 3]


def test_the_first_record_after_a_restart_does_not_join_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    session = Session(Scorer(policy(NEVER), XL), "before", on_record=AuditLog(path).write)

    def loop() -> None:
        for _ in range(10):
            session.step(latents(), noise_level=1.0)

    with full_at(1000), pytest.raises(OSError, match=r"bytes were written|too large"):
        loop()
    torn = path.read_bytes()
    assert not torn.endswith(b"\n")
    write_many(path, "after", 2)  # a log of its own, as after a restart
    assert path.read_bytes().startswith(torn + b"\n{")
    written = path.read_bytes()[len(torn) + 1 :].decode().splitlines()
    assert [strict(line)["step"] for line in written] == [0, 0, 0, 1, 1, 1]


def test_a_writer_beside_one_that_tore_its_line_loses_nothing(tmp_path: Path) -> None:
    """Both were open before the disk was full."""
    path = tmp_path / "audit.jsonl"
    other = AuditLog(path)
    path.write_bytes(b'{"half": ')
    session = Session(Scorer(policy(NEVER), XL), "other", on_record=other.write)
    session.step(latents(), noise_level=1.0)
    first, *rest = path.read_text().splitlines()
    assert first == '{"half": '
    assert [strict(line)["image"] for line in rest] == [0, 1]


@pytest.mark.parametrize("action", ["block", "observe"])
@pytest.mark.parametrize("at", [1, 4])
def test_one_line_that_cannot_be_written_is_enough(action: str, at: int) -> None:
    """Even under `on_error: allow`, and where verdicts are put off."""
    calls: list[int] = []

    def flaky(session: Session, record: Any) -> None:
        calls.append(record.step)
        if len(calls) == at:
            raise OSError("the network is gone")

    rule = policy(NEVER, action, extra="on_error: allow")
    session = Session(Scorer(rule, XL), on_record=flaky)

    def loop() -> None:
        for step in range(4):
            session.step(latents(), noise_level=3.0 - step, final=step == 3)

    with pytest.raises(OSError, match="the network is gone"):
        loop()


# -- logging and metrics -----------------------------------------------------------------------


def test_blocks_are_logged_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = guarded(blocking())
    capsys.readouterr()
    with caplog.at_level(logging.INFO, "latentguard.guard"):
        pipe(**small.sdxl_arguments(2))
    found = [record.getMessage() for record in caplog.records if record.name == "latentguard.guard"]
    assert len(found) == 2
    assert all("block: concept 'guns' matched 'revolver'" in text for text in found)
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="session")
def reader() -> Any:
    """The process's meter provider, which can be set once; a worker may come back to a module."""
    metrics = pytest.importorskip("opentelemetry.metrics", reason="needs opentelemetry-api")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="needs opentelemetry-sdk")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export", reason="needs the same")
    reader = export.InMemoryMetricReader()
    metrics.set_meter_provider(sdk.MeterProvider(metric_readers=[reader]))
    return reader


def counted(reader: Any, name: str, by: str | None = None, **labels: str) -> Any:
    """What an instrument has counted with these labels, or what by the values of one of them."""
    found: dict[Any, float] = {}
    data = reader.get_metrics_data()
    for resource_metrics in () if data is None else data.resource_metrics:
        for scope in resource_metrics.scope_metrics:
            # A server in the same process may count, too.
            ours = scope.scope.name == "latentguard"
            for metric in scope.metrics if ours else ():
                for point in metric.data.data_points if metric.name == name else ():
                    given = dict(point.attributes)
                    if labels.items() <= given.items():
                        value = getattr(point, "value", getattr(point, "count", 0))
                        key = given.get(by)
                        found[key] = found.get(key, 0) + value
    return found if by is not None else sum(found.values())


def named(name: str, *args: Any, **options: Any) -> Any:
    """A policy of a name of its own: counters live as long as the process."""
    return policy(*args, **options).model_copy(update={"name": name})


def test_metrics_count_images_steps_and_matches(reader: Any) -> None:
    rule = named("metrics-block", ALWAYS, concept=FINAL_ONLY)
    guarded(LatentGuard(rule, XL))(**small.sdxl_arguments(2))
    labels = {"policy": "metrics-block", "model": "linear"}
    assert counted(reader, "latentguard.steps", **labels) == 4
    assert counted(reader, "latentguard.seconds", **labels) == 4
    assert counted(reader, "latentguard.images", "decision", **labels) == {"block": 2}
    assert counted(reader, "latentguard.matches", "action", **labels, concept="guns") == {
        "blocked": 2
    }
    assert counted(reader, "latentguard.errors", **labels) == 0


def test_metrics_count_errors(reader: Any) -> None:
    guard = LatentGuard(named("metrics-error", NEVER), XL)
    guarded(guard)(**small.sdxl_arguments(), latents=torch.full((1, 4, 8, 8), math.nan))
    labels = {"policy": "metrics-error"}
    assert counted(reader, "latentguard.errors", **labels) == 1
    assert counted(reader, "latentguard.images", "decision", **labels) == {"block": 1}


def test_a_call_that_failed_has_no_image_that_was_allowed(reader: Any) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("mine")

    guard = LatentGuard(named("metrics-failed", NEVER), XL)
    with pytest.raises(RuntimeError, match="mine"):
        guarded(guard)(**small.sdxl_arguments(2), callback_on_step_end=fails)
    found = counted(reader, "latentguard.images", "decision", policy="metrics-failed")
    assert found == {"block": 2}


def test_an_image_that_is_judged_twice_counts_once(reader: Any) -> None:
    """By what became of it: a callback made the finished images others."""

    def swap(pipe: Any, index: int, timestep: Any, given: Any) -> Any:
        broken = {"latents": given["latents"] * math.nan}
        return broken if index == 3 else given

    guard = LatentGuard(named("metrics-twice", NEVER), XL)
    pipe = guarded(guard)
    pipe(**small.sdxl_arguments(2), callback_on_step_end=swap)
    assert [record.final for record in guard.history][-2:] == [True, True]
    found = counted(reader, "latentguard.images", "decision", policy="metrics-twice")
    assert found == {"block": 2}


def test_metrics_of_a_loop_of_ones_own(reader: Any) -> None:
    guard = LatentGuard(named("metrics-own", NEVER), XL, space="sdxl")
    session = guard.session()
    for step in range(3):
        session.step(latents(3), noise_level=2.0 - step, final=step == 2)
    labels = {"policy": "metrics-own"}
    assert counted(reader, "latentguard.images", "decision", **labels) == {"allow": 3}
    assert counted(reader, "latentguard.steps", **labels) == 3
