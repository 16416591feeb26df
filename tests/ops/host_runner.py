"""Builds and drives csrc/testing/runner: CUDA kernels, thread by thread, under the sanitizers."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = tuple(
    str(path.relative_to(CSRC))
    for path in sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("testing/*.cpp")])
)
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-clobbered",  # a warning about setjmp that the fibers do not use
)
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# detect_stack_use_after_return would give every fiber a heap of its own.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


class KernelError(Exception):
    """What the host layer or a sanitizer reported."""


def build() -> Path:
    """The runner for the sources as they are now; compiled once per state of the sources."""
    folder = ROOT / "build" / "host"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # one process compiles, the others wait
        return _build(folder)


def _build(folder: Path) -> Path:
    compiler = os.environ.get("CXX", "c++")
    headers = b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*.h")))
    common = hashlib.sha256(headers + " ".join((compiler, *FLAGS)).encode())

    def compile_one(source: str) -> Path:
        digest = common.copy()
        digest.update((CSRC / source).read_bytes())
        target = folder / f"{Path(source).stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            command = [compiler, *FLAGS, f"-I{CSRC}", "-x", "c++", "-c", str(CSRC / source)]
            subprocess.run([*command, "-o", str(part)], check=True, cwd=CSRC)
            part.replace(target)
        return target

    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    name = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    runner = folder / f"runner-{name}"
    if not runner.exists():
        link = [compiler, *FLAGS, *map(str, objects), "-o", str(runner)]
        subprocess.run(link, check=True)
    return runner


def toy(runner: Path, name: str) -> str:
    """What was reported about a toy kernel: the host layer's sentence or a sanitizer's."""
    done = subprocess.run(
        [str(runner), "toy", name],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    return done.stderr


def _bytes(array: Tensor | None) -> bytes | None:
    if array is None:
        return None
    return array.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run(
    runner: Path, operation: int, numbers: list[float], arrays: list[Tensor | None]
) -> list[Tensor | None]:
    """Run one kernel; every array comes back as the kernel left it (outputs among them)."""
    case = [struct.pack("<qq", operation, len(numbers)), struct.pack(f"<{len(numbers)}d", *numbers)]
    case.append(struct.pack("<q", len(arrays)))
    for array in arrays:
        raw = _bytes(array)
        case.append(struct.pack("<q", -1 if raw is None else len(raw)))
        case.append(raw or b"")
    with tempfile.TemporaryDirectory() as folder:
        cases, results = Path(folder) / "cases", Path(folder) / "results"
        cases.write_bytes(b"".join(case))
        done = subprocess.run(
            [str(runner), str(cases), str(results)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=os.environ | ENVIRONMENT,
        )
        if done.returncode != 0:
            raise KernelError(done.stderr[-4000:])
        answer = results.read_bytes()
    status, length = struct.unpack_from("<qq", answer)
    message = answer[16 : 16 + length].decode()
    if status != 0:
        raise KernelError(message or f"the launcher returned error {status}")
    position = 16 + length
    out: list[Tensor | None] = []
    for array in arrays:
        if array is None:
            out.append(None)
            continue
        size = array.numel() * array.element_size()
        raw = bytearray(answer[position : position + size])
        position += size
        flat = torch.frombuffer(raw, dtype=array.dtype) if size else array.new_empty(0)
        out.append(flat.view(array.shape))
    return out
