"""Latents as WebDataset shards: KEY.latent.npy, KEY.json, and where known KEY.txt and KEY.cls."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from latentguard.atomic import replacing
from latentguard.encode.encoding import Encoded
from latentguard.files.writing import description


class ShardWriter:
    """One shard, which appears whole when its `with` block ends, or not at all.

    The same samples give the same bytes. A shard without samples is no file.
    """

    def __init__(self, path: Path, said: dict[str, Any]) -> None:
        self._path, self._said = path, said
        self._stack = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self.count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, one: Encoded) -> None:
        """The next sample."""
        if self._tar is None:
            file = self._stack.enter_context(replacing(self._path))
            archive = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            self._tar = self._stack.enter_context(archive)
        key = f"{self._path.stem}-{self.count:06d}"
        self.count += 1
        for ending, data in _members(one, self._said):
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))


def _members(one: Encoded, said: dict[str, Any]) -> list[tuple[str, bytes]]:
    sample = one.sample
    fields = description(one.latents)
    if one.latents.space.standard.scale is None:
        # Statistics of the VAE, hundreds of numbers, which stand in the run's encode.json.
        fields = {key: value for key, value in fields.items() if key not in ("scale", "shift")}
    del fields["ids"]
    values: dict[str, Any] = {
        **fields,
        "id": sample.id,
        "picture": {
            "width": one.width,
            "height": one.height,
            "box": [float(side) for side in one.box],
            "sha256": one.sha256,
        },
        "encoded": said,
    }
    for key, value in (("label", sample.label), ("label_name", sample.label_name)):
        if value is not None:
            values[key] = value
    if sample.source_metadata is not None:
        values["source"] = sample.source_metadata
    found = [_latents(one), ("json", _json(values))]
    if sample.caption is not None:
        found.append(("txt", sample.caption.encode("utf-8", "replace")))
    if sample.label is not None:
        found.append(("cls", str(sample.label).encode("utf-8", "replace")))
    return found


def _latents(one: Encoded) -> tuple[str, bytes]:
    import torch

    tensor = one.latents.tensor[0].contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy has not
        from safetensors.torch import save

        return "latent.safetensors", save({"latents": tensor})
    held = io.BytesIO()
    np.save(held, tensor.numpy(), allow_pickle=False)
    return "latent.npy", held.getvalue()


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True, sort_keys=True).encode()
