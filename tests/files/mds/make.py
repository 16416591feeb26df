"""Write the shards of this folder; needs mosaicml-streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.format.mds.encodings import Encoding, _encodings

HERE = Path(__file__).parent


class UInt8(Encoding):
    """As the loader of imagenet.int8 registers it."""

    def encode(self, obj: Any) -> bytes:
        return obj.tobytes()

    def decode(self, data: bytes) -> Any:
        return (np.frombuffer(data, np.uint8).astype(np.float32) / 255.0 - 0.5) * 24.0


def write(
    name: str, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any
) -> None:
    with MDSWriter(out=str(HERE / name), columns=columns, **options) as writer:
        for sample in samples:
            writer.write(sample)


if __name__ == "__main__":
    latents = np.random.default_rng(0).standard_normal((8, 4, 4, 4)).astype(np.float16)
    np.save(HERE / "latents.npy", latents)
    plain = {"key": "str", "caption": "str", "height": "int", "width": "int32"}
    write(
        "plain",
        plain | {"latents": "ndarray", "jpg": "bytes"},
        [
            {"key": f"k{n}", "caption": "a cat", "height": 4, "width": 4, "jpg": b"\xff\xd8\xff",
             "latents": one.astype(np.float32)}
            for n, one in enumerate(latents)
        ],
        size_limit=2000,
    )  # fmt: skip
    write(
        "fixed",
        {"id": "int", "latent": "ndarray:float16:4,4,4"},
        [{"id": n, "latent": one} for n, one in enumerate(latents)],
        compression="gz",
    )
    write(
        "zstd",
        {"caption": "str", "latents_256": "bytes", "caption_latents": "bytes"},
        [
            {"caption": "a cat", "latents_256": one.tobytes(), "caption_latents": bytes(64)}
            for one in latents
        ],
        compression="zstd",
        hashes=["sha1"],
    )
    _encodings["uint8"] = UInt8
    quantized = ((latents.astype(np.float32) / 24 + 0.5) * 255).round().astype(np.uint8)
    write(
        "int8",
        {"vae_output": "uint8", "label": "str"},
        [{"vae_output": one, "label": "0"} for one in quantized],
    )
