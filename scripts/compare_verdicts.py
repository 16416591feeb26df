"""Whether two checkouts decide alike: scan records of the same files, compared to the last bit.

    python scripts/compare_verdicts.py OLD/.venv/bin/latentguard NEW/.venv/bin/latentguard \\
        examples/latents.pt --policy family --policy weapons

Compared are decision, error, reason, and of every concept its margin, probability, threshold, best
prompt and whether it matched. Keys that one of the two does not have are named and left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import zip_longest
from typing import Any

Record = dict[str, Any]


def records(command: str, paths: list[str], options: list[str]) -> list[Record]:
    """One record for each image. Ends the program where the scan itself fails."""
    arguments = [command, "scan", *paths, *options, "--format", "json", "--quiet"]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    # 0 and 1 are decisions, 3 is an image that could not be judged.
    if ran.returncode not in (0, 1, 3):
        sys.exit(f"{' '.join(arguments)} ended with {ran.returncode}: {ran.stderr.strip()}")
    return [json.loads(line) for line in ran.stdout.splitlines()]


def differences(old: Any, new: Any, where: str, left_out: set[str]) -> list[str]:
    """What differs, one line each, with the way to it."""
    if isinstance(old, dict) and isinstance(new, dict):
        left_out |= {f"{where}.{key}" for key in old.keys() ^ new.keys()}
        found = []
        for key in old.keys() & new.keys():
            found += differences(old[key], new[key], f"{where}.{key}", left_out)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = []
        for one, other in zip(old, new, strict=True):
            found += differences(one, other, where, left_out)
        return found
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", help="the latentguard command of one checkout's environment")
    parser.add_argument("new", help="that of the other")
    parser.add_argument("paths", nargs="+", help="latents files")
    parser.add_argument("--policy", action="append", default=[], help="may be given several times")
    parser.add_argument("--option", action="append", default=[], help="a further option of scan")
    arguments = parser.parse_args()
    worst, left_out = 0, set[str]()
    for policy in arguments.policy or ["default"]:
        options = ["--policy", policy, *arguments.option]
        sides = [records(c, arguments.paths, options) for c in (arguments.old, arguments.new)]
        found = []
        for number, (old, new) in enumerate(zip_longest(*sides, fillvalue={})):
            found += [f"image {number}{line}" for line in differences(old, new, "", left_out)]
        worst += len(found)
        print(f"{policy}: {len(sides[0])} and {len(sides[1])} records, {len(found)} differences")
        for line in found[:20]:
            print(f"  {line}")
    if left_out:
        print("not compared, as one side lacks it: " + ", ".join(sorted(left_out)))
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()
