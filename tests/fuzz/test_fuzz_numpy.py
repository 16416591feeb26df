"""Structures of .npy and .npz: what is read here is what numpy.load hands out."""

from __future__ import annotations

import io
import random
import struct
import warnings
from collections import Counter
from typing import Any

import numpy as np
from fuzz_archives import FAULTS, Archive, Part, prefixed, two_directories
from fuzz_helpers import chosen, compared

from latentguard.files.claims import KEYS
from latentguard.files.numpy_files import open_npy, open_npz


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` files of each kind; keys: tried, read, refused, disagreed."""
    counts: Counter[str] = Counter()
    for index in range(seed, seed + count):
        chance = random.Random(index)
        compared(counts, f"npy {index}", npy(chance), open_npy, npy_library)
        compared(counts, f"npz {index}", npz(chance), open_npz, npz_library)
    return counts


def npy_library(data: bytes) -> tuple[Any, dict[str, Any]]:
    value = _loaded(data)
    assert isinstance(value, np.ndarray), "an archive, not an array"
    return value, {}


def npz_library(data: bytes) -> tuple[Any, dict[str, Any]]:
    value = _loaded(data)
    assert not isinstance(value, np.ndarray), "an array, not an archive"
    # What numpy would hand out under each name; the latents are the only unknown one.
    names = [name for name in value.files if name not in KEYS]
    if "latents" in names:
        names = ["latents"]
    arrays = {name: value[name] for name in names}
    latents = chosen({name: (a.shape, a.dtype.kind == "f") for name, a in arrays.items()})
    return [arrays[name] for name in latents], {
        name: value[name].tolist() for name in KEYS & set(value.files)
    }


def _loaded(data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.load(io.BytesIO(data), allow_pickle=False)


def npz(chance: random.Random) -> bytes:
    archive = _archive(chance)
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        chance.choice(FAULTS)(chance, archive)
    kind = chance.random()
    if kind < 0.03:
        return two_directories(archive, _archive(chance))
    if kind < 0.06:
        # A polyglot: numpy looks at the first bytes, zip readers at the last.
        return prefixed(archive.build(), chance.choice([b"\0", npy(chance), b"\x93NUMPY"]))
    return archive.build()


def _archive(chance: random.Random) -> Archive:
    members = [("latents.npy", npy(chance))]
    more = [
        ("space", np.array("sdxl")),
        ("scaled", np.array(True)),
        ("ids", np.array(["a", "b\0", "c\u00e9"])),
        ("height", np.array(2)),
        ("scale", np.array([0.5, 1, 2, 4])),
        ("shift", np.float32(0.1)),
        ("x", np.zeros((1, 4, 2, 2), np.float32)),
        ("layout", np.array(["spatial"], dtype=object)),
    ]
    for name, value in chance.sample(more, chance.randrange(4)):
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=True)
        content = buffer.getvalue()
        if chance.random() < 0.1:
            content = npy(chance)
        members.append((name + chance.choice([".npy", ".npy", ".npy", ""]), content))
    if chance.random() < 0.1:
        members[0] = (
            chance.choice(["latents", "arr_0.npy", "Latents.npy", "a/latents.npy"]),
            members[0][1],
        )
    method = chance.choice([0, 8])
    chance.shuffle(members)
    parts = [Part(name.encode(), content, method) for name, content in members]
    return Archive(parts, zip64=chance.random() < 0.2)


def npy(chance: random.Random) -> bytes:
    """A .npy written field by field, mostly as numpy does, and here and there not."""

    def rare(probability: float = 0.03) -> bool:
        return chance.random() < probability

    descr = chance.choice(["<f4", "<f4", "<f2", "<f8", ">f4", "f4", "=f2", "float32", "d", "e"])
    if rare(0.1):
        descr = chance.choice(
            ["|V2", "<c8", "<i4", "|O", "<f4,<f4", "2<f4", "<U4", "<g", "|S4", ""]
        )
    shape: Any = chance.choice([(4, 2, 2), (1, 4, 2, 2), (2, 4, 2, 2), (3, 4, 2, 3)])
    written = f"({', '.join(str(n) for n in shape)})"
    if rare(0.15):
        written = chance.choice(
            [
                "(2, 4, 2, 2,)", "[2, 4, 2, 2]", "(2L, 4L, 2L, 2L)", "(True, 4, 2, 2)",
                "(-1, 4, 2, 2)", "(0, 4, 2, 2)", "(0x2, 4, 2, 2)", "(2_0, 4, 2, 2)",
                "(2.0, 4, 2, 2)", "()", "16", "(1, 1, 4, 2, 2)", "(+1, 4, 2, 2)",
                "(\u0661, 4, 2, 2)", "(1+1j, 4, 2, 2)",
            ]
        )  # fmt: skip
    shown = repr(descr)
    if rare():
        shown = chance.choice(
            ["('<f4', (2,))", "[('a', '<f4')]", "'<f' '4'", "b'<f4'", "None", "'f4' # x"]
        )
    items = [
        ("'descr'", shown),
        (
            "'fortran_order'",
            "False" if not rare(0.1) else chance.choice(["True", "0", "1", "None"]),
        ),
        ("'shape'", written),
    ]
    if rare():
        items.append(chance.choice([*items, ("'more'", "1"), ("'shape'", "(4, 2, 2)")]))
    if rare(0.2):
        chance.shuffle(items)
    if rare():
        items.pop()
    text = "{" + ", ".join(f"{key}: {value}" for key, value in items) + chance.choice(["}", ", }"])
    if rare():
        text = chance.choice(
            [text[:-1], " " + text, text + "#\u00e9", text + "\0", "dict(" + text + ")"]
        )
    text += " " * chance.choice([0, 1, 15, 40]) + chance.choice(["\n", "\n", ""])
    version = chance.choice([(1, 0), (1, 0), (2, 0), (3, 0)])
    raw = text.encode("utf-8" if version == (3, 0) or rare() else "latin-1", "replace")
    length = len(raw) + (chance.choice([-1, 1, 60]) if rare(0.02) else 0)
    if rare():
        version = chance.choice([(1, 1), (4, 0), (0, 0)])
    form = "<H" if version[0] == 1 else "<L"
    start = b"\x93NUMPY" + bytes(version) + struct.pack(form, length) + raw
    item = {"f2": 2, "e": 2, "f8": 8, "d": 8}.get(descr.strip("<>="), 4)
    size = item * int(np.prod(shape)) + (chance.choice([-1, 1, 8]) if rare(0.05) else 0)
    return start + np.random.default_rng(chance.randrange(99)).bytes(size)


def test_numpy_load_hands_out_what_was_read() -> None:
    counts = structures(0, 600)
    assert counts["disagreed"] == 0
    assert counts["read"] > 200
    assert counts["refused"] > 200
