#!/usr/bin/env bash
# check_wheel.sh [FOLDER]: builds an sdist and a wheel in a clean environment, checks what they say of
# themselves, installs the wheel in another, and runs tests/installed from a third folder.
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
python=${PYTHON:-python3}
dist=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q --disable-pip-version-check build twine
# From a copy, so that nothing that was compiled here gets into the wheel.
git -C "$checkout" archive --format=tar HEAD | (mkdir "$work/source" && tar -x -C "$work/source")
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/build/bin/twine" check --strict "$work/dist"/*
rm -rf "$work/source"

"$python" -m venv "$work/installed"
wheel=$(echo "$work/dist"/*.whl)
"$work/installed/bin/pip" install -q --disable-pip-version-check -c constraints.txt "$wheel[onnx]" pytest
mkdir "$work/elsewhere"
cp -r tests/installed examples/latents.pt "$work/elsewhere"
(cd "$work/elsewhere" && PATH="$work/installed/bin:$PATH" "$work/installed/bin/python" -m pytest -q installed)
cp "$work/dist"/* "$dist"
ls -l "$dist"
