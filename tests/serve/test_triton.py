"""`latentguard export triton`: against Triton's schema, and run step by step without Triton.

The configs are checked against the published schema and the rules that the server applies to them,
the graph runs in ONNX Runtime, and model.py in a bare process. test_triton_server.py does
the rest, where a server is installed.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_helpers import read_configs, run_ensemble, run_python

from latentguard import cli
from latentguard.errors import ModelError
from latentguard.export import TritonOptions, export_triton
from latentguard.runtime import Guard, Verdict

Array = Any
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(guard_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "model_repository"
    export_triton(guard_file, out)
    return out


def test_the_layout_is_a_model_repository(repository: Path, guard_file: Path) -> None:
    judge = {path.name for path in (ROOT / "latentguard" / "judge").glob("*.py")}
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert files == {
        "latentguard/config.pbtxt",
        "latentguard/1/.keep",
        "latentguard_scores/config.pbtxt",
        "latentguard_scores/1/model.onnx",
        "latentguard_decision/config.pbtxt",
        "latentguard_decision/1/model.py",
        "latentguard_decision/1/rules.json",
        "latentguard_decision/1/latentguard/__init__.py",
        "latentguard_decision/1/latentguard/deprecated.py",
        "latentguard_decision/1/latentguard/errors.py",
        *(f"latentguard_decision/1/latentguard/judge/{name}" for name in judge),
    }
    copied = (repository / "latentguard_scores/1/model.onnx").read_bytes()
    assert copied == guard_file.read_bytes()


def test_configs_keep_to_the_published_schema(repository: Path) -> None:
    configs = read_configs(repository)
    assert list(configs) == ["latentguard", "latentguard_decision", "latentguard_scores"]
    for name, config in configs.items():
        assert config.name == name
        assert config.max_batch_size == 32
        assert list(config.version_policy.specific.versions) == [1]
        assert config.IsInitialized()
    scores = configs["latentguard_scores"]
    assert scores.backend == "onnxruntime"
    batching = scores.dynamic_batching
    assert list(batching.preferred_batch_size) == [8, 16]
    assert batching.max_queue_delay_microseconds == 2000
    assert batching.default_queue_policy.max_queue_size == 256
    assert batching.default_queue_policy.timeout_action == 0  # REJECT
    assert [(g.kind, g.count) for g in scores.instance_group] == [(0, 1)]  # KIND_AUTO
    (latents,) = scores.input
    assert (latents.name, list(latents.dims)) == ("latents", [32, 32, 32])
    warm = scores.model_warmup
    assert [sample.batch_size for sample in warm] == [1, 8, 16]
    assert all(list(sample.inputs["latents"].dims) == [32, 32, 32] for sample in warm)
    assert all(sample.inputs["latents"].zero_data for sample in warm)


def test_configs_keep_to_the_rules_that_the_server_applies(repository: Path) -> None:
    """Those of core's ValidateModelConfig and ValidateEnsembleConfig."""
    configs = read_configs(repository)
    ensemble = configs["latentguard"]
    assert ensemble.platform == "ensemble"
    assert not ensemble.instance_group
    assert not ensemble.model_warmup
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = configs[step.model_name]
        assert list(config.version_policy.specific.versions) == [step.model_version]
        assert config.max_batch_size >= ensemble.max_batch_size
        assert config.instance_group
        assert {t.name for t in config.input} == set(step.input_map)
        assert set(step.output_map) <= {t.name for t in config.output}
        for tensor in config.input:
            assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        for tensor in config.output:
            target = step.output_map[tensor.name]
            assert target not in known
            known[target] = (tensor.data_type, list(tensor.dims))
    for tensor in ensemble.output:
        assert known[tensor.name] == (tensor.data_type, list(tensor.dims))


def test_the_backend_finds_the_shapes_that_the_config_states(repository: Path) -> None:
    """onnxruntime_backend: the first axis of each tensor is open, fixed axes are the config's."""
    import onnxruntime

    config = read_configs(repository)["latentguard_scores"]
    session = onnxruntime.InferenceSession(str(repository / "latentguard_scores/1/model.onnx"))
    nodes = {node.name: node for node in (*session.get_inputs(), *session.get_outputs())}
    for tensor in (*config.input, *config.output):
        first, *rest = nodes[tensor.name].shape
        assert isinstance(first, str)
        assert len(rest) == len(tensor.dims)
        fixed = [(a, b) for a, b in zip(rest, tensor.dims, strict=True) if isinstance(a, int)]
        assert all(a == b for a, b in fixed)


def test_verdicts_are_those_of_the_runtime(
    repository: Path, guard_file: Path, latents: Array
) -> None:
    answer = run_ensemble(repository, "latentguard", {"latents": latents})
    with Guard(guard_file) as guard:
        expected = guard.scan(latents)
        scores = guard.scores(latents)
    verdicts = [Verdict.from_dict(json.loads(text)) for (text,) in answer["verdict"]]
    assert verdicts == expected
    decisions = [text.decode() for (text,) in answer["decision"]]
    assert decisions == [verdict.decision for verdict in expected]
    assert {"allow", "block", "review"} <= set(decisions)
    for name in ("probability", "margin", "embedding"):
        np.testing.assert_array_equal(answer[name], scores[name])


def test_scores_of_integers_cannot_hide_that_an_image_is_not_finite(
    repository: Path, latents: Array
) -> None:
    known = json.loads((repository / "latentguard_decision/1/rules.json").read_text())
    concepts = known["policy"]["concepts"]
    scores = np.zeros((1, len(concepts)), np.uint8)
    begins = np.cumsum([0, *(len(concept["prompts"]) for concept in concepts[:-1])])[None]
    found = run_python(
        repository / "latentguard_decision" / "1",
        {
            "latents": latents[:1] * np.float32(np.nan),
            "probability": scores,
            "margin": scores,
            "best_prompt": begins,
        },
        ["decision", "verdict", "probability", "margin"],
    )
    assert found["decision"].tolist() == [[b"block"]]
    assert np.isnan(found["probability"]).all()


def test_an_image_that_is_not_finite_is_blocked_and_the_others_are_judged(
    repository: Path, guard_file: Path, latents: Array
) -> None:
    batch = latents[:4].copy()
    batch[1, 3, 5, 7] = np.nan
    batch[2] = np.inf
    answer = run_ensemble(repository, "latentguard", {"latents": batch})
    verdicts = [Verdict.from_dict(json.loads(text)) for (text,) in answer["verdict"]]
    with Guard(guard_file) as guard:
        assert verdicts[0] == guard.scan(batch[:1])[0]
    assert [verdict.error is None for verdict in verdicts] == [True, False, False, True]
    assert [d.decode() for (d,) in answer["decision"]][1:3] == ["block", "block"]
    assert np.isnan(answer["probability"][1:3]).all()
    assert np.isfinite(answer["probability"][[0, 3]]).all()


def _scores(latents: Array, concepts: int = 13) -> dict[str, Array]:
    shape = len(latents), concepts
    return {
        "latents": latents,
        "probability": np.zeros(shape, np.float32),
        "margin": np.zeros(shape, np.float32),
        "best_prompt": np.zeros(shape, np.int64),
    }


OUTPUTS = ["decision", "verdict", "probability", "margin"]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given.pop("margin"),
        lambda given: given.update(probability=given["probability"][:1]),
        lambda given: given.update(latents=np.array([["x"], ["y"]])),
    ],
    ids=["a tensor is missing", "other numbers of images", "latents of no number"],
)
def test_a_decision_step_that_raises_answers_with_an_error(
    repository: Path, latents: Array, change: Any
) -> None:
    given = _scores(latents[:2])
    change(given)
    with pytest.raises(RuntimeError, match="not judged"):
        run_python(repository / "latentguard_decision/1", given, OUTPUTS)


def test_scores_of_another_policy_are_never_allowed(repository: Path, latents: Array) -> None:
    """A graph and rules of different exports: other numbers of concepts, prompts of others."""
    folder = repository / "latentguard_decision/1"
    for concepts in (12, 13):
        found = run_python(folder, _scores(latents[:2], concepts), OUTPUTS)
        assert [text for (text,) in found["decision"]] == [b"block", b"block"]
        assert all(json.loads(text)["error"] for (text,) in found["verdict"])


def test_the_decision_step_names_prompts_that_were_not_seen(
    repository: Path, latents: Array, tmp_path: Path
) -> None:
    shutil.copytree(repository / "latentguard_decision", tmp_path / "latentguard_decision")
    folder = tmp_path / "latentguard_decision/1"
    rules = json.loads((folder / "rules.json").read_text())
    rules["policy"]["uncovered"] = "warn"
    rules["seen"][0] = False
    (folder / "rules.json").write_text(json.dumps(rules))
    found = run_python(folder, _scores(latents[:1]), OUTPUTS)
    concepts = json.loads(found["verdict"][0][0])["concepts"]
    assert concepts[0]["unseen"] == [rules["prompts"][0]]


def test_rules_that_do_not_fit_keep_the_step_from_loading(
    repository: Path, latents: Array, tmp_path: Path
) -> None:
    shutil.copytree(repository / "latentguard_decision", tmp_path / "latentguard_decision")
    folder = tmp_path / "latentguard_decision/1"
    rules = json.loads((folder / "rules.json").read_text())
    rules["covered"].pop()
    (folder / "rules.json").write_text(json.dumps(rules))
    with pytest.raises(AssertionError, match="one value for each of 13 concepts, got 12"):
        run_python(folder, _scores(latents[:1]), OUTPUTS)


def test_the_step_runs_on_the_servers_python(repository: Path) -> None:
    """Triton images had Python 3.10 until 24.10: nothing newer in what they run."""
    for path in (repository / "latentguard_decision").rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_a_further_version_joins_its_own_steps(guard_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    (out / "another").mkdir(parents=True)
    options = TritonOptions(name="moderation", device="gpu", instances=2, threads=4)
    export_triton(guard_file, out, options)
    with pytest.raises(ModelError, match="holds version 1 of moderation already"):
        export_triton(guard_file, out, options)
    export_triton(guard_file, out, TritonOptions(name="moderation", version=2))
    assert (out / "another").is_dir()
    for name, config in read_configs(out).items():
        assert list(config.version_policy.specific.versions) == [2]
        assert {path.name for path in (out / name).iterdir()} == {"1", "2", "config.pbtxt"}
        for step in config.ensemble_scheduling.step:
            assert step.model_version == 2


def test_options_reach_the_config(guard_file: Path, tmp_path: Path) -> None:
    options = TritonOptions(
        device="gpu", instances=2, threads=4, max_batch=64, preferred=(32, 4), max_delay_ms=0.5
    )
    export_triton(guard_file, tmp_path / "models", options)
    config = read_configs(tmp_path / "models")["latentguard_scores"]
    assert config.max_batch_size == 64
    assert [(g.kind, g.count) for g in config.instance_group] == [(1, 2)]  # KIND_GPU
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.parameters["intra_op_thread_count"].string_value == "4"
    assert len(config.parameters["sha256"].string_value) == 64


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "../up"}, "name must be letters"),
        ({"name": ""}, "name must be letters"),
        ({"version": 0}, "version must be at least 1"),
        ({"max_batch": 4}, "preferred batch sizes must be 1 to 4"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_delay_ms": 20.0, "timeout_ms": 10.0}, "less than its timeout"),
    ],
)
def test_options_that_no_server_takes(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        TritonOptions(**wrong)


def test_a_policys_name_cannot_add_to_the_config(guard_file: Path, tmp_path: Path) -> None:
    from latentguard.export.triton_config import Tensor, scores_config

    name = 'é"} } instance_group { count: 99 }\n\\'
    rules = {
        "policy": {"name": name, "version": "1"},
        "model": {"name": "m", "sha256": "0"},
        "space": "flux2",
        "scaled": True,
        "sha256": "0" * 64,
    }
    latents = Tensor("latents", "TYPE_FP32", (32, -1, -1))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.pbtxt").write_text(scores_config(TritonOptions(), [latents], [], rules))
    config = read_configs(tmp_path)["m"]
    assert config.parameters["policy"].string_value == f"{name} 1"
    assert len(config.instance_group) == 1
    # Open sizes are warmed up on two sizes that occur.
    dims = [list(sample.inputs["latents"].dims) for sample in config.model_warmup]
    assert dims == [[32, 64, 64]] * 3 + [[32, 128, 128]] * 3


def test_external_weights_move_along(guard_file: Path, tmp_path: Path, latents: Array) -> None:
    import onnx

    from latentguard.export.metadata import write_metadata
    from latentguard.runtime.artifact import METADATA

    source = tmp_path / "big.onnx"
    model = onnx.load(guard_file)
    found = json.loads(next(p.value for p in model.metadata_props if p.key == METADATA))
    onnx.save(model, source, save_as_external_data=True, location="big.data", size_threshold=1024)
    model = onnx.load(source, load_external_data=False)
    import hashlib

    found["files"] = {"big.data": hashlib.sha256((tmp_path / "big.data").read_bytes()).hexdigest()}
    source.write_bytes(write_metadata(model, found))
    out = tmp_path / "models"
    export_triton(source, out)
    assert {path.name for path in (out / "latentguard_scores/1").iterdir()} == {
        "model.onnx",
        "big.data",
    }
    answer = run_ensemble(out, "latentguard", {"latents": latents[:2]})
    assert [text for (text,) in answer["decision"]] == [b"allow", b"allow"]


def test_the_command(
    guard_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> int | str | None:
        argv = ["latentguard", "export", "triton", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    out = tmp_path / "models"
    assert run(guard_file, "--out", out, "--max-batch", 8, "--device", "cpu") in (0, None)
    assert "wrote" in capsys.readouterr().out
    config = read_configs(out)["latentguard_scores"]
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    assert [g.kind for g in config.instance_group] == [2]  # KIND_CPU
    assert run(guard_file, "--out", out) == 2
    assert "holds version 1" in capsys.readouterr().err
    assert run(guard_file, "--out", tmp_path / "other", "--sha256", "0" * 64) == 2
    assert "not the pinned" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
