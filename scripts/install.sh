#!/usr/bin/env bash
# Installs the pinned requirements and this checkout into the environment of $PYTHON, and nothing
# twice: a stamp in the environment says which checkout, requirements and sources it holds.
set -euo pipefail
cd "$(dirname "$0")/.."

# What pip reads, and what is compiled: a change of either needs a new install.
requirements=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
sources=$({ cat setup.py; find csrc -type f | LC_ALL=C sort | xargs -r cat; env | grep -E '^(LATENTGUARD_|TORCH_CUDA_ARCH_LIST=)' || true; } | sha256sum | cut -c1-16)
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
stamp="$prefix/.latentguard-installed"
wanted="$requirements $sources $PWD"
had_requirements=none
[ ! -f "$stamp" ] || read -r had_requirements _ < "$stamp"

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if [ "$had_requirements" != "$requirements" ]; then
    echo "Installing the requirements into $prefix (about 6 GB the first time) ..."
    # Torch first: the extension is compiled against it, without build isolation.
    "$PYTHON" -m pip install -q -c constraints.txt setuptools wheel ninja pybind11 torch torchvision
    extras=dev
    "$PYTHON" -m pip install -q -c constraints.txt --no-build-isolation -e ".[$extras]"
else
    echo "Building this checkout ..."
    "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
fi
echo "$wanted" > "$stamp"
