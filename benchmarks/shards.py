"""Shards of latents as they are asked for: seeded, made from real ones, never on a disk.

`python benchmarks/shards.py --port 0 --images 1000000 --shards 100` serves them on loopback as
http://127.0.0.1:PORT/00000.tar and so on, for scans of more than a disk holds.
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples" / "latents.pt"


@lru_cache
def originals() -> np.ndarray:
    """The 25 example pictures as scaled FLUX.2 latents, float32 [25, 32, 32, 32]."""
    import torch

    tensor: torch.Tensor = torch.load(EXAMPLES, weights_only=True)["latents"]
    return tensor.float().numpy()


def latents(count: int, seed: int, cells: int) -> np.ndarray:
    """Scaled FLUX.2 latents, float16 [count, 32, cells, cells], cells at most 32.

    Each is a crop of one picture, mirrored or not, with up to a fifth of another mixed in, brought
    back to the first one's deviation: its statistics stay those of pictures.
    """
    random = np.random.default_rng((seed, cells))
    sources = originals()
    made = np.empty((count, *sources.shape[1:2], cells, cells), dtype=np.float16)
    room = sources.shape[-1] - cells + 1
    for n in range(count):
        first, second = (_crop(sources, random, room, cells) for _ in range(2))
        share = 0.2 * random.random()
        mixed = (1 - share) * first + share * second
        made[n] = mixed * (first.std() / mixed.std())
    return made


def _crop(sources: np.ndarray, random: np.random.Generator, room: int, cells: int) -> np.ndarray:
    y, x = random.integers(room, size=2)
    crop = sources[random.integers(len(sources)), :, y : y + cells, x : x + cells]
    return crop[..., ::-1] if random.random() < 0.5 else crop


def shard(count: int, seed: int, cells: int) -> bytes:
    """A WebDataset shard: KEY.latent.npy of each. Space and scale are for the scan to say."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for n, one in enumerate(latents(count, seed, cells)):
            data = io.BytesIO()
            np.save(data, one)
            header = tarfile.TarInfo(f"{seed:05d}{n:07d}.latent.npy")
            header.size = data.tell()
            data.seek(0)
            tar.addfile(header, data)
    return out.getvalue()


def sizes(images: int, shards: int) -> list[int]:
    """How many images each shard has."""
    return [images // shards + (n < images % shards) for n in range(shards)]


class Shards(BaseHTTPRequestHandler):
    """Serves N.tar with ranges; the last few shards are kept, as a client asks block by block."""

    protocol_version = "HTTP/1.1"
    counts: tuple[int, ...] = ()
    cells = 24
    _lock = Lock()
    _kept: dict[int, bytes] = {}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, format: str, *args: object) -> None:
        """Not a word."""

    def _answer(self, whole: bool) -> None:
        found = re.fullmatch(r"/(\d{5})\.tar", self.path)
        if found is None or int(found[1]) >= len(self.counts):
            self.send_error(404)
            return
        data = self._shard(int(found[1]))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]), len(data) - 1) if asked and asked[2] else len(data) - 1
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{found[1]}-{len(data)}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if whole:
            self.wfile.write(memoryview(data)[first : last + 1])

    def _shard(self, number: int) -> bytes:
        with self._lock:
            if number not in self._kept:
                while len(self._kept) >= 4:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[number] = shard(self.counts[number], number, self.cells)
            return self._kept[number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--cells", type=int, default=24)
    args = parser.parse_args()
    Shards.counts, Shards.cells = tuple(sizes(args.images, args.shards)), args.cells
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Shards)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
