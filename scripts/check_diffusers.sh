#!/usr/bin/env bash
# check_diffusers.sh [VERSION TRANSFORMERS HUB TOKENIZERS ACCELERATE]: runs the guard's tests of versions with
# another diffusers, by default the oldest that is supported, with what it needs, over the environment of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pins=("diffusers==${1:-0.32.0}" "transformers==${2:-4.46.3}" "huggingface_hub==${3:-0.27.1}" "tokenizers==${4:-0.20.3}" "accelerate==${5:-1.0.1}")
# In front of the environment's own packages, without touching them.
"$python" -m pip install -q --disable-pip-version-check --no-deps --target "$work/packages" "${pins[@]}"
PYTHONPATH="$work/packages" "$python" -W ignore -m pytest -q -p no:cacheprovider tests/guard/test_diffusers_versions.py
