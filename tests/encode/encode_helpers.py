"""Pictures, shards and tables, small."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth color noise, as a photo is smooth."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def photo_bytes(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    return encoded(photo(seed, size), kind)


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def rows(count: int = 3) -> dict[str, list[Any]]:
    """Columns as Hugging Face's datasets has them."""
    pictures = [{"bytes": photo_bytes(n), "path": f"{n}.png"} for n in range(count)]
    return {
        "image": pictures,
        "text": [f"caption {n}" for n in range(count)],
        "label": [n % 2 for n in range(count)],
    }


def hugging_face_table(columns: Mapping[str, list[Any]]) -> Any:
    """An Arrow table with the metadata that the datasets package writes."""
    import pyarrow as pa

    table = pa.table(dict(columns))
    features = {
        "image": {"_type": "Image"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    said = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": said})


def save_to_disk(folder: Path, columns: Mapping[str, list[Any]], files: int = 2) -> Path:
    """A dataset in the layout of Hugging Face's `save_to_disk`."""
    import pyarrow as pa

    folder.mkdir()
    table = hugging_face_table(columns)
    names = []
    each = -(-table.num_rows // files)
    for number in range(files):
        name = f"data-{number:05d}-of-{files:05d}.arrow"
        part = table.slice(number * each, each)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(part)
        names.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder
