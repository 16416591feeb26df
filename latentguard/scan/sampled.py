"""A sample while it is scanned: which images are handed on to be judged, and which records stay.

Shards are read whole, since nothing says beforehand how many images they hold; only images that are
in the sample at that moment are judged, and the records of those that leave it are dropped. That
costs the judging of rows * (1 + ln(size / rows)) images of a shard instead of rows, and no memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from latentguard.files import ArrayRecord
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampling import Cluster, ClusterSample, Reservoir, SamplePlan


@dataclass
class _Open:
    """A shard whose records are not all here. waiting: images that are being judged."""

    name: str
    reservoir: Reservoir
    read: bool = False
    waiting: int = 0
    records: dict[int, ScanRecord] = field(default_factory=dict)


class Sampler:
    """Draws the sample of a plan. `rows` gives what has to be judged, `keep` takes the records of
    these, in the same order, and gives those of the sample.

    read: the images of a shard.
    """

    def __init__(self, plan: SamplePlan, read: Callable[[str], Iterable[ArrayRecord]]) -> None:
        self.plan = plan
        self._read = read
        self._open: deque[_Open] = deque()
        self._judging: deque[tuple[_Open, int]] = deque()
        self._clusters: dict[str, Cluster] = {}

    @property
    def sample(self) -> ClusterSample:
        """What was seen so far."""
        plan = self.plan
        return ClusterSample(len(plan.shards), plan.rows, plan.seed, dict(self._clusters))

    def rows(self) -> Iterator[ArrayRecord]:
        """Images of the shards that are drawn, until there are enough."""
        images = 0
        for count, name in enumerate(self.plan.shards):
            if self.plan.enough(count, images):
                return
            shard = _Open(name, self.plan.reservoir(name))
            self._open.append(shard)
            for record in self._read(name):
                wanted, left = shard.reservoir.offer()
                if left is not None:
                    shard.records.pop(left, None)
                if wanted:
                    shard.waiting += 1
                    self._judging.append((shard, shard.reservoir.seen - 1))
                    yield record
            shard.read = True
            images += min(self.plan.rows, shard.reservoir.seen)

    def keep(self, records: Iterable[ScanRecord]) -> Iterator[ScanRecord]:
        """Of the records of `rows` those of the sample, shard by shard."""
        for record in records:
            shard, place = self._judging.popleft()
            shard.waiting -= 1
            shard.records[place] = record
            yield from self._finished()
        yield from self._finished()

    def _finished(self) -> Iterator[ScanRecord]:
        while self._open and self._open[0].read and not self._open[0].waiting:
            shard = self._open.popleft()
            kept = [shard.records[place] for place in shard.reservoir.places]
            outcomes = Counter(record.outcome for record in kept)
            self._clusters[shard.name] = Cluster(shard.reservoir.seen, outcomes)
            yield from kept
