"""How often the 95 % interval of `latentguard scan --sample` holds the truth.

    python benchmarks/sampling.py

Made populations of 2,000 shards, of each of which a sample is drawn many times: what docs/scan.md
says of where the interval falls short.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from latentguard.scan.estimates import shares
from latentguard.scan.sampling import Cluster, ClusterSample

SHARDS = 2000
KINDS = {
    "no clustering, 2 %": (0.5, None, 0.02),
    "mixed sources, about 14 %": (0.5, ([0.005, 0.1, 0.7], [0.5, 0.35, 0.15]), 0.0),
    "the same, sizes from 100 to 10,000": (1.0, ([0.005, 0.1, 0.7], [0.5, 0.35, 0.15]), 0.0),
    "in 2 % of the shards, half of each": (0.5, ([0.0, 0.5], [0.98, 0.02]), 0.0),
    "in 0.3 % of the shards, half of each": (0.5, ([0.0, 0.5], [0.997, 0.003]), 0.0),
}
"""Spread of sizes (of their logarithms); shares by shard with their frequencies, or one share."""


def population(random: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and blocked images of each shard."""
    spread, mixture, alone = KINDS[kind]
    size = np.exp(random.normal(6.9, spread, SHARDS)).astype(int) + 1
    share = (
        np.full(SHARDS, alone)
        if mixture is None
        else random.choice(mixture[0], SHARDS, p=mixture[1])
    )
    return size, random.binomial(size, share)


def drawn(
    random: np.random.Generator, size: np.ndarray, blocked: np.ndarray, shards: int, rows: int
) -> ClusterSample:
    """A sample of so many shards, and images of each."""
    clusters = {}
    for place in random.choice(SHARDS, shards, replace=False):
        looked = min(int(size[place]), rows)
        hits = int(random.hypergeometric(blocked[place], size[place] - blocked[place], looked))
        counts = Counter({"block": hits, "allow": looked - hits})
        clusters[str(place)] = Cluster(int(size[place]), counts)
    return ClusterSample(SHARDS, rows, 0, clusters)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    print("| blocked images | shards x images | interval holds | mean width | none seen |")
    print("| --- | --- | --- | --- | --- |")
    for kind in KINDS:
        for shards, rows in ((10, 1000), (30, 333), (100, 100), (200, 50)):
            random = np.random.default_rng(7)
            held = width = none = 0.0
            for number in range(draws):
                if number % 20 == 0:
                    size, blocked = population(random, kind)
                truth = blocked.sum() / size.sum()
                found = shares(drawn(random, size, blocked, shards, rows))
                share = next(share for share in found if share.outcome == "block")
                held += share.low <= truth <= share.high
                width += share.high - share.low
                none += share.seen == 0
            print(
                f"| {kind} | {shards} x {rows} | {held / draws:.1%} | {width / draws:.2%} "
                f"| {none / draws:.1%} |"
            )


if __name__ == "__main__":
    main()
