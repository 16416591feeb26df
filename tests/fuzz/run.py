"""The differential fuzz at length: python tests/fuzz/run.py --seconds 120 [--only torch]."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
BATCH = 200
HEADINGS = ("format", "tried", "read alike", "refused", "disagreed", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for each format")
    parser.add_argument("--seed", type=int, default=10**6, help="the tests begin at 0")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    disagreed = 0
    print(" | ".join(HEADINGS))
    for path in sorted(HERE.glob("test_fuzz_*.py")):
        name = path.stem.removeprefix("test_fuzz_")
        if options.only not in name:
            continue
        structures = importlib.import_module(path.stem).structures
        counts: Counter[str] = Counter()
        seed, start = options.seed, time.monotonic()
        while (spent := time.monotonic() - start) < options.seconds:
            counts += structures(seed, BATCH)
            seed += BATCH
        tried, refused, disagreed_here = (counts[k] for k in ("tried", "refused", "disagreed"))
        alike = tried - refused - disagreed_here
        row = [name, tried, alike, refused, disagreed_here, round(spent)]
        print(" | ".join(str(cell) for cell in row), flush=True)
        disagreed += counts["disagreed"]
    return 1 if disagreed else 0


if __name__ == "__main__":
    sys.exit(main())
