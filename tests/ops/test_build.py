"""What setup.py does when a half does not compile, and which extension is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import ops_cases
import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from latentguard.ops import build_info, library

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
FAILURE = "Error compiling objects for extension"


def _setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """setup.py as it runs with an nvcc that compiles nothing; the build's facts go to `folder`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    version = (torch.version.cuda or "13.0").split(".")[0]
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {version}.0, V" && exit\nexit 1\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    for name in ("LATENTGUARD_CPP", "LATENTGUARD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", f"{version}.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: asked.update(arguments))
    spec = importlib.util.spec_from_file_location("latentguard_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FACTS", folder / "_build.json")
    return module, asked


def _build(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]) -> Any:
    """Run the build command with a compiler that fails on sources ending in one of `broken`."""
    extension = asked["ext_modules"][0]

    def compiles(command: Any) -> None:
        if any(source.endswith(broken) for source in command.extensions[0].sources):
            raise RuntimeError(FAILURE)

    monkeypatch.setattr(cpp_extension.BuildExtension, "run", compiles)
    command = asked["cmdclass"]["build_ext"](setuptools.Distribution())
    command.extensions = [extension]
    command.run()
    return extension


def test_a_failing_cu_file_leaves_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, asked = _setup(monkeypatch, tmp_path)
    assert any(source.endswith(".cu") for source in asked["ext_modules"][0].sources)
    extension = _build(asked, monkeypatch, (".cu",))
    assert extension.sources == module.SOURCES + module.CPU
    assert not any("LATENTGUARD_CUDA" in flag for flag in extension.extra_compile_args["cxx"])
    assert not any("cuda" in name for name in extension.libraries)
    facts = json.loads((tmp_path / "_build.json").read_text())
    assert facts["cuda"] == ""
    assert FAILURE in facts["without_cuda"]
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("latentguard: no CUDA kernels, compilation with")


def test_a_failing_cu_file_is_an_error_where_cuda_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, asked = _setup(monkeypatch, tmp_path)
    monkeypatch.setenv("LATENTGUARD_CUDA", "1")
    with pytest.raises(RuntimeError, match=FAILURE):
        _build(asked, monkeypatch, (".cu",))


def test_failing_cpp_leaves_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, asked = _setup(monkeypatch, tmp_path)
    _build(asked, monkeypatch, (".cpp",))
    assert "reason" in json.loads((tmp_path / "_build.json").read_text())
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("latentguard: operators use the PyTorch reference")


def test_cuda_that_is_asked_for_is_never_left_out_silently(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = _setup(monkeypatch, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert module._extension() == ({}, {"reason": "no C++ compiler (no-such-compiler)"})
    monkeypatch.setenv("LATENTGUARD_CUDA", "1")
    with pytest.raises(SystemExit, match="LATENTGUARD_CUDA=1, but no C"):
        module._extension()


def test_interface_is_the_same_in_both_halves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _setup(monkeypatch, tmp_path)[0].INTERFACE == build_info.INTERFACE


@pytest.mark.skipif(ops_cases.needs_extension, reason=ops_cases.EXTENSION_REASON)
def test_an_extension_of_an_older_version_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = build_info.read() or {}
    monkeypatch.setattr(build_info, "read", lambda: facts | {"interface": build_info.INTERFACE - 1})
    assert "install it again" in library._refused()


@pytest.mark.skipif(ops_cases.needs_extension, reason=ops_cases.EXTENSION_REASON)
def test_an_extension_that_the_last_build_did_not_make_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_info, "read", lambda: {"reason": "compilation failed: no space"})
    assert library._refused() == (
        "compilation failed: no space; the extension of an earlier build is not loaded"
    )


def test_doctor_hears_why_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(library.importlib, "import_module", absent)
    monkeypatch.setattr(build_info, "read", lambda: {"reason": "no C++ compiler (c++)"})
    assert library._load() == (None, "no C++ compiler (c++)")
