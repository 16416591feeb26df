"""Compiles the CUDA kernels and tabulates what ptxas says; fails on a spill or a local stack.

    python benchmarks/kernels.py [--arch 80 90 100] [--jobs 2]

No GPU is needed. Occupancy is theoretical: from registers, threads and the dynamic shared memory
of the Latent-CLIP sizes, within the limits of each architecture (CUDA programming guide,
"Technical specifications per compute capability").
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = tuple(sorted(path.stem for path in (CSRC / "cuda").glob("*.cu")))
THREADS = 256
# Registers, threads and bytes of shared memory per multiprocessor.
LIMITS = {
    80: (65536, 2048, 164 * 1024),
    90: (65536, 2048, 228 * 1024),
    100: (65536, 2048, 228 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the system keeps per block
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


class Kernel(NamedTuple):
    arch: int
    name: str
    dtype: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that the multiprocessor holds."""
        registers, threads, shared = LIMITS[self.arch]
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            registers // (per_warp * THREADS // 32),
            threads // THREADS,
            shared // (self.shared + RESERVED),
        )
        return blocks * THREADS / threads


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def shared_bytes(kernel: str, dtype: str) -> int:
    """Dynamic shared memory for Latent-CLIP B/8: D 768, patch 8, E 512, 16 concepts."""
    if kernel.startswith("null"):
        return 0
    size = 4 if dtype == "float32" else 2
    pad, areas = 16 // size, 8 * 3072
    rows = 16 * (768 + 4) * 4
    if kernel.startswith("patch_embed"):
        depth = min(1024 // size, 256)
        return rows + _up(16 * (depth + pad) * size, 128) + areas
    keys = 0 if "backward" in kernel else 16 * 2 * 16 * 8
    return rows + 16 * (1024 // size + pad) * size + areas + 128 + keys


def _compile(nvcc: str, source: str, arch: int) -> list[Kernel]:
    command = [nvcc, "-std=c++20", "-O3", f"-I{CSRC}", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    command += ["-cubin", "-o", os.devnull, str(CSRC / "cuda" / f"{source}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found = []
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for match in re.finditer(pattern, done.stderr, re.DOTALL):
        mangled, stack, stores, loads, registers, rest = match.groups()
        name = re.search(
            r"\d+((?:null|patch_embed|concept)\w*?_kernel)I(f|6__half|13__nv_bfloat16)E", mangled
        )
        if name is None:
            raise SystemExit(f"cannot read the kernel's name: {mangled}")
        deeper = re.search(r"(\d+) bytes cumulative stack size", rest)
        dtype = TYPES[name[2]]
        found.append(
            Kernel(
                arch,
                name[1],
                dtype,
                int(registers),
                max(int(stack), int(deeper[1]) if deeper else 0),
                int(stores) + int(loads),
                shared_bytes(name[1], dtype),
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(LIMITS)
    )
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", "2")))
    options = parser.parse_args()
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin"
    )
    if nvcc is None:
        print("make kernels needs nvcc on PATH or under CUDA_HOME", file=sys.stderr)
        return 2
    work = [(source, arch) for arch in options.arch for source in KERNELS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda item: _compile(nvcc, *item), work))
    kernels = [kernel for found in results for kernel in found]
    print("| sm | kernel | dtype | registers | stack | spills | shared bytes | occupancy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for k in kernels:
        print(
            f"| {k.arch} | {k.name} | {k.dtype} | {k.registers} | {k.stack} | {k.spills} "
            f"| {k.shared} | {k.occupancy:.0%} |"
        )
    bad = [k for k in kernels if k.stack or k.spills]
    for k in bad:
        print(f"sm_{k.arch} {k.name} {k.dtype}: spills or uses local memory", file=sys.stderr)
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
