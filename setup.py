"""Builds the optional extension; everything else about the package stands in pyproject.toml.

LATENTGUARD_CUDA=0|1|auto    never, always (an error without nvcc), or where nvcc is found (auto)
LATENTGUARD_CPP=0            build nothing: the operators run on their PyTorch reference
LATENTGUARD_CPU=avx2|baseline  instruction set of the CPU kernels (default: this machine's)
TORCH_CUDA_ARCH_LIST         as PyTorch reads it; default "8.0 9.0+PTX"
MAX_JOBS                     parallel compilations

Without torch or a compiler the package installs all the same; one line says what is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).resolve().parent
FACTS = HERE / "latentguard" / "ops" / "_build.json"


def _sources(pattern: str) -> list[str]:
    return [str(path.relative_to(HERE)) for path in sorted((HERE / "csrc").glob(pattern))]


SOURCES = [*_sources("*.cpp"), *_sources("ops/*.cpp")]
CPU = _sources("cpu/*.cpp")
CUDA = _sources("cuda/*.cu")
DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"
# As in latentguard/ops/build_info.py, which says when to raise it.
INTERFACE = 3


def _nvcc() -> str | None:
    """Path of nvcc: from CUDA_HOME, from PATH, or from torch's own nvidia packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if found:
        return found
    packaged = [Path(path) / "nvidia" for path in sys.path if (Path(path) / "nvidia").is_dir()]
    candidates = [nvcc for root in packaged for nvcc in sorted(root.glob("*/bin/nvcc"))]
    return str(candidates[-1]) if candidates else None


def _toolkit(nvcc: str) -> Path:
    """The toolkit's folder: what nvcc itself says, as the one on PATH may be a script."""
    asked = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    found = re.search(r"TOP=(.+)", asked.stderr)
    return Path(found[1].strip() if found else Path(nvcc).parent.parent).resolve()


def _headers(torch: Any, toolkit: Path) -> list[str]:
    """The toolkit's headers, then those of torch's nvidia packages, which a toolkit may lack.

    In this order: the packages have cuda_runtime.h too, but not all that it includes.
    """
    site = Path(torch.__file__).resolve().parents[1]
    folders = [toolkit / "include", *sorted((site / "nvidia").glob("*/include"))]
    return [str(path) for path in folders if path.is_dir()]


def _runtime_library(torch: Any) -> list[str]:
    """Folders that may hold libcudart for the linker."""
    site = Path(torch.__file__).resolve().parents[1]
    return [str(path) for path in sorted((site / "nvidia").glob("*/lib"))]


def _cuda_version(nvcc: str) -> str:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    words = answer.stdout.split("release ")
    return words[1].split(",")[0] if len(words) > 1 else "unknown"


def _wants_cuda(torch: Any) -> tuple[str | None, str]:
    """nvcc to compile with, or None and the reason."""
    choice = os.environ.get("LATENTGUARD_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"LATENTGUARD_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return None, "LATENTGUARD_CUDA=0"
    nvcc = _nvcc()
    reason = ""
    if nvcc is None:
        reason = "nvcc was not found (CUDA_HOME, PATH, nvidia packages)"
    elif torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    elif _cuda_version(nvcc).split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = f"nvcc is {_cuda_version(nvcc)}, torch was built for CUDA {torch.version.cuda}"
    if reason and choice == "1":
        raise SystemExit(f"LATENTGUARD_CUDA=1, but {reason}")
    return (None, reason) if reason else (nvcc, "")


def _cpu_flags(torch: Any) -> tuple[list[str], str]:
    """Compiler flags and name of the instruction set for the CPU kernels."""
    here = torch.backends.cpu.get_cpu_capability()
    choice = os.environ.get("LATENTGUARD_CPU", "avx2" if here in ("AVX2", "AVX512") else "baseline")
    if choice == "avx2":
        flags = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2", "-DCPU_CAPABILITY=AVX2"]
        return flags, "AVX2"
    if choice == "baseline":
        return ["-DCPU_CAPABILITY_DEFAULT", "-DCPU_CAPABILITY=DEFAULT"], "baseline"
    raise SystemExit(f"LATENTGUARD_CPU must be avx2 or baseline, got {choice!r}")


def _extension() -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments for setup() that build the extension, and the facts about that build."""
    if os.environ.get("LATENTGUARD_CPP", "1") == "0":
        return _nothing("LATENTGUARD_CPP=0")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return _nothing("torch was not there when latentguard was installed")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return _nothing(f"no C++ compiler ({compiler})")

    nvcc, without_cuda = _wants_cuda(torch)
    extension, facts = _described(torch, cpp_extension, nvcc, without_cuda)

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """Compiles with ninja; a failure costs the CUDA kernels, or all of them, and one line."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, use_ninja=shutil.which("ninja") is not None, **kwargs)

        def run(self) -> None:
            done = facts
            try:
                try:
                    super().run()
                except Exception as error:
                    if nvcc is None or os.environ.get("LATENTGUARD_CUDA") == "1":
                        raise
                    why = f"compilation with {nvcc} failed: {_first_line(error)} (see above)"
                    plain, done = _described(torch, cpp_extension, None, why)
                    vars(self.extensions[0]).update(vars(plain))
                    super().run()
            except Exception as error:
                if "1" in (os.environ.get("LATENTGUARD_CPP"), os.environ.get("LATENTGUARD_CUDA")):
                    raise
                done = {"reason": f"compilation failed: {_first_line(error)} (see above)"}
            _write(done)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}, facts


def _nothing(reason: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """No extension, and why."""
    if os.environ.get("LATENTGUARD_CUDA") == "1":
        raise SystemExit(f"LATENTGUARD_CUDA=1, but {reason}")
    return {}, {"reason": reason}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _described(
    torch: Any, cpp_extension: Any, nvcc: str | None, without_cuda: str
) -> tuple[Any, dict[str, Any]]:
    """The extension, with CUDA where nvcc is given, and the facts about that build."""
    cpu_flags, cpu = _cpu_flags(torch)
    common = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fopenmp", "-g0"]
    defines = [f'-DLATENTGUARD_TORCH_VERSION="{torch.__version__}"', "-DAT_PARALLEL_OPENMP=1"]
    includes, library_dirs = [str(HERE / "csrc")], []
    sources = SOURCES + CPU
    facts: dict[str, Any] = {"cpu": cpu, "torch": torch.__version__, "cuda": ""}
    facts["interface"] = INTERFACE
    arguments: dict[str, Any] = {"cxx": [*common, *defines, *cpu_flags]}
    if nvcc is None:
        facts["without_cuda"] = without_cuda
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        # torch looks for the toolkit when cpp_extension is imported; tell it what was found.
        toolkit = _toolkit(nvcc)
        cpp_extension.CUDA_HOME = str(toolkit)
        facts |= {"cuda": _cuda_version(nvcc), "architectures": architectures}
        arguments["cxx"] += [
            "-DLATENTGUARD_CUDA",
            f'-DLATENTGUARD_CUDA_VERSION="{facts["cuda"]}"',
            f'-DLATENTGUARD_ARCHITECTURES="{architectures}"',
        ]
        arguments["nvcc"] = ["-O3", "-std=c++20", "--threads=1", "-DLATENTGUARD_CUDA"]
        sources = sources + CUDA
        includes += _headers(torch, toolkit)
        library_dirs += _runtime_library(torch)
    kind = cpp_extension.CppExtension if nvcc is None else cpp_extension.CUDAExtension
    extension = kind(
        "latentguard._C",
        sources,
        include_dirs=includes,
        library_dirs=library_dirs,
        extra_compile_args=arguments,
        depends=[str(p.relative_to(HERE)) for p in sorted((HERE / "csrc").rglob("*.h"))],
    )
    return extension, facts


def _write(facts: dict[str, Any]) -> None:
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if facts.get("reason"):
        line = f"latentguard: operators use the PyTorch reference, {facts['reason']}"
        print(line, file=sys.stderr)
    elif facts.get("without_cuda"):
        print(f"latentguard: no CUDA kernels, {facts['without_cuda']}", file=sys.stderr)


_arguments, _facts = _extension()
if "reason" in _facts:
    _write(_facts)
setup(**_arguments)
