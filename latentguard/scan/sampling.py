"""A random sample of a scan: which shards, which of their images, and what was seen in them.

Shards are taken in the order of a seeded hash of their names, each with the same chance; within a
shard, the images with the lowest seeded hashes are taken. So what is chosen depends on the seed and
on names alone, not on who reads which shard when. estimates.py says what the sample tells.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

OUTCOMES = ("allow", "review", "steer", "block", "error")

MAX_CLUSTERS = 1_000_000
MAX_NAME = 1000

SPREAD = 200
"""Default number of shards that a sample is spread over. They are read whole."""


@dataclass(frozen=True)
class Draw:
    """The request for a sample: about so many images, from at least so many shards."""

    images: int
    spread: int = SPREAD
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """What one shard of a sample must know. of: how many shards there are. rows: how many of its
    images are looked at, at most."""

    of: int
    rows: int
    seed: int


@dataclass(frozen=True)
class SamplePlan:
    """What to read.

    shards: all there are, in the order in which they are drawn. images: how many to look at in all.
    rows: how many of one shard at most. spread: how many shards at least, if there are as many.
    """

    shards: tuple[str, ...]
    images: int
    rows: int
    spread: int
    seed: int

    @classmethod
    def of(
        cls, shards: Iterable[str], images: int, seed: int = 0, spread: int = SPREAD
    ) -> SamplePlan:
        """Draw from `shards`, each of which counts once. Raises ValueError where nothing can be
        drawn."""
        if images < 1 or spread < 1:
            raise ValueError(f"a sample needs images and shards, got {images} and {spread}")
        drawn = sorted(set(shards), key=lambda name: (_hash(seed, name), name))
        spread = min(spread, len(drawn), images)
        rows = -(-images // max(spread, 1))
        return cls(tuple(drawn), images, rows, spread, seed)

    def reservoir(self, shard: str) -> Reservoir:
        """What to take from one shard."""
        return Reservoir(self.rows, self.seed, shard)

    def start(self) -> ClusterSample:
        """The sample, before anything is read."""
        return ClusterSample(len(self.shards), self.rows, self.seed)

    def first(self, looked_at: Mapping[str, int]) -> int:
        """How many shards the sample takes, the first of all; fewer where that is not known yet.

        looked_at: of the shards that were read, how many images were looked at.
        """
        count = self.spread
        while count < len(self.shards):
            read = [looked_at[name] for name in self.shards[:count] if name in looked_at]
            if len(read) < count or self.enough(count, sum(read)):
                break
            # As many as there must be at the least, so that there are never too many.
            count += -(-(self.images - sum(read)) // self.rows)
        return min(count, len(self.shards))

    def enough(self, shards: int, images: int) -> bool:
        """Whether no further shard is needed, after so many shards and images of them."""
        return shards >= self.spread and images >= self.images


class Reservoir:
    """A uniform random sample of a stream whose length is not known: at most `rows` of it."""

    def __init__(self, rows: int, seed: int, shard: str) -> None:
        self.rows = rows
        self.seen = 0
        self._salt = _hash(seed, shard)
        self._heap: list[tuple[int, int]] = []

    def offer(self) -> tuple[bool, int | None]:
        """Whether the next of the stream is in the sample so far, and the place, from 0, of the one
        that leaves it for that."""
        place = self.seen
        self.seen += 1
        digest = hashlib.blake2b(place.to_bytes(8, "big"), key=self._salt, digest_size=8).digest()
        entry = (-int.from_bytes(digest, "big"), place)
        if len(self._heap) < self.rows:
            heapq.heappush(self._heap, entry)
            return True, None
        if entry <= self._heap[0]:
            return False, None
        return True, heapq.heapreplace(self._heap, entry)[1]

    @property
    def places(self) -> list[int]:
        """The places in the stream that are in the sample, ascending."""
        return sorted(place for _, place in self._heap)


class Cluster(NamedTuple):
    """One shard of a sample: `size` images in it, and what became of those that were looked at."""

    size: int
    outcomes: Counter[str]

    @property
    def looked_at(self) -> int:
        return self.outcomes.total()


@dataclass(frozen=True)
class ClusterSample:
    """What was seen of each shard that was drawn.

    shards: how many there are to draw from. rows: how many images of one are looked at, at most.
    clusters: those drawn, by name. Samples of one plan can be merged.
    """

    shards: int
    rows: int
    seed: int
    clusters: Mapping[str, Cluster] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images were looked at."""
        return sum(cluster.looked_at for cluster in self.clusters.values())

    @property
    def size(self) -> int:
        """How many images the shards that were drawn hold."""
        return sum(cluster.size for cluster in self.clusters.values())

    def with_shard(self, name: str, size: int, outcomes: Mapping[str, int]) -> Self:
        """The sample with one shard more. Raises ValueError where it is in it already."""
        one = {name[:MAX_NAME]: Cluster(size, Counter(outcomes))}
        return self.merged(type(self)(self.shards, self.rows, self.seed, one))

    def check(self, other: ClusterSample) -> None:
        """Raises ValueError where two are not parts of one sample."""
        ours, theirs = (self.shards, self.rows, self.seed), (other.shards, other.rows, other.seed)
        if ours != theirs:
            raise ValueError(
                "two samples were drawn differently: shards, images of each and seed are "
                f"{ours} and {theirs}"
            )
        if both := self.clusters.keys() & other.clusters.keys():
            raise ValueError(f"a shard of a sample is counted twice: {min(both)}")

    def merged(self, other: ClusterSample) -> Self:
        """Both. Raises ValueError as `check` does."""
        self.check(other)
        return type(self)(self.shards, self.rows, self.seed, {**self.clusters, **other.clusters})

    def to_dict(self) -> dict[str, Any]:
        """As a tally carries it: of each shard its name, size, and counts by `OUTCOMES`."""
        return {
            "shards": self.shards,
            "rows": self.rows,
            "seed": self.seed,
            "clusters": [
                [name, cluster.size, *[cluster.outcomes[outcome] for outcome in OUTCOMES]]
                for name, cluster in sorted(self.clusters.items())
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """What `to_dict` gave. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"shards", "rows", "seed", "clusters"}:
            raise ValueError("sample: must have shards, rows, seed and clusters")
        shards, rows, seed = (data[key] for key in ("shards", "rows", "seed"))
        if not all(type(value) is int for value in (shards, rows, seed)) or rows < 1:
            raise ValueError("sample: shards, rows and seed must be whole numbers")
        found = data["clusters"]
        if not isinstance(found, list) or len(found) > min(MAX_CLUSTERS, max(shards, 0)):
            raise ValueError(f"sample: clusters must be a list of at most {shards} shards")
        clusters = dict(map(_read_cluster, found))
        if len(clusters) < len(found):
            raise ValueError("sample: a shard is counted twice")
        return cls(shards, rows, seed, clusters)


def _read_cluster(item: Any) -> tuple[str, Cluster]:
    if not isinstance(item, list) or len(item) != 2 + len(OUTCOMES):
        raise ValueError(f"sample: a shard must be a name and {1 + len(OUTCOMES)} counts")
    name, *counts = item
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise ValueError(f"sample: a shard's name must be text of at most {MAX_NAME} characters")
    if not all(type(count) is int and 0 <= count < 1 << 50 for count in counts):
        raise ValueError(f"sample: the counts of a shard must be whole numbers, got {counts}")
    size, *seen = counts
    if sum(seen) > size:
        raise ValueError(f"sample: more images of a shard were looked at than it has: {counts}")
    return name, Cluster(size, +Counter(dict(zip(OUTCOMES, seen, strict=True))))


def _hash(seed: int, name: str) -> bytes:
    text = f"{seed}\0{name}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
