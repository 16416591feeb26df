#!/usr/bin/env bash
# What `make demo` takes from nothing: a fresh clone, a fresh environment, seconds and megabytes.
# Results go to benchmarks/results/first_minute.md. pip's own cache and download time are in it.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q . "$work/clone"
cd "$work/clone"
load=$(cut -d' ' -f1 /proc/loadavg)
begun=$(date +%s.%N)
make demo >"$work/first" 2>&1
between=$(date +%s.%N)
make demo >"$work/second" 2>&1
ended=$(date +%s.%N)
awk -v a="$begun" -v b="$between" -v c="$ended" -v mb="$(du -sm .venv | cut -f1)" -v load="$load" \
    -v cpu="$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1), $(nproc) cores" 'BEGIN {
    print "# The first minute\n"
    printf "`make demo`: %s, load %s before. The downloads are those of the package index at hand.\n\n", cpu, load
    print "| | seconds | environment, MB |\n| --- | --- | --- |"
    printf "| from a fresh clone | %.1f | %d |\n| again | %.1f | |\n", b - a, mb, c - b }' \
    >"$here/benchmarks/results/first_minute.md"
cat "$here/benchmarks/results/first_minute.md"
