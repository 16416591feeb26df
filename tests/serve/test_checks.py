"""What the examples read of a request: latents of a known convention, and nothing of hostile bytes.

The readers are those of `latentguard.files`, and are tested there; here is what a service does with
them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import Limits, Refused, read_latents
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.runtime import Guard

SAID = {"space": "flux2", "scaled": True}
LATENTS = np.random.default_rng(0).normal(size=(2, 32, 4, 6)).astype("f4")


@pytest.fixture(scope="module")
def guard(guard_file: Path) -> Iterator[Guard]:
    with Guard(guard_file, warm_up=False) as guard:
        yield guard


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), **options)
    return stream.getvalue()


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(array: Any, kind: str, **metadata: str) -> bytes:
    header = {
        "__metadata__": metadata,
        "latents": {"dtype": kind, "shape": list(array.shape), "data_offsets": [0, array.nbytes]},
    }
    return safetensors(header, array.tobytes())


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_npy_with_the_querys_convention(guard: Guard, dtype: str) -> None:
    array = LATENTS.astype(dtype)
    found = read_latents(npy(array), SAID, guard, Limits())
    np.testing.assert_array_equal(found.latents, array)
    assert (found.height, found.width) == (None, None)


def test_npy_in_fortran_order(guard: Guard) -> None:
    found = read_latents(npy(np.asfortranarray(LATENTS)), SAID, guard, Limits())
    np.testing.assert_array_equal(found.latents, LATENTS)


def test_a_second_tensor_of_latents_is_refused(guard: Guard) -> None:
    size = LATENTS.nbytes
    one = {"dtype": "F32", "shape": list(LATENTS.shape), "data_offsets": [0, size]}
    header = {"latents": one, "other": {**one, "data_offsets": [size, 2 * size]}}
    with pytest.raises(Refused, match="other"):
        read_latents(safetensors(header, 2 * LATENTS.tobytes()), SAID, guard, Limits())


def test_safetensors_with_its_own(guard: Guard) -> None:
    data = tensor(LATENTS, "F32", space="flux2", scaled="true")
    np.testing.assert_array_equal(read_latents(data, {}, guard, Limits()).latents, LATENTS)


def test_bfloat16_becomes_float32(guard: Guard) -> None:
    halves = (LATENTS.view(np.uint32) >> 16).astype("<u2")
    found = read_latents(tensor(halves, "BF16"), SAID, guard, Limits())
    expected = (LATENTS.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(found.latents, expected)


def test_packed_tokens_keep_their_size(guard: Guard) -> None:
    tokens = LATENTS.reshape(2, 6, 128)
    packed = {**SAID, "layout": "packed", "height": 4, "width": 6}
    found = read_latents(npy(tokens), packed, guard, Limits())
    np.testing.assert_array_equal(found.latents, tokens)
    assert (found.height, found.width) == (4, 6)


@pytest.mark.parametrize(
    ("asked", "metadata", "says"),
    [
        ({}, {}, "say space"),
        ({"space": "flux2"}, {}, "say scaled"),
        ({}, {"space": "flux2", "scaled": "false"}, "reads scaled=True"),
        ({"space": "sdxl", "scaled": True}, {}, "reads space=flux2"),
        (SAID, {"space": "sdxl"}, "the file says space"),
        ({"space": "no-space", "scaled": True}, {}, "space must be one of"),
        (SAID, {"scaled": "maybe"}, "scaled must be"),
        (SAID, {"scale": "2.0"}, "scale or shift of their own"),
    ],
)
def test_a_convention_is_never_guessed(
    guard: Guard, asked: dict[str, Any], metadata: dict[str, str], says: str
) -> None:
    with pytest.raises(Refused, match=says) as refused:
        read_latents(tensor(LATENTS, "F32", **metadata), asked, guard, Limits())
    assert refused.value.status == 422


@pytest.mark.parametrize(
    "limits", [Limits(max_images=1), Limits(max_cells=23)], ids=["images", "cells"]
)
def test_limits(guard: Guard, limits: Limits) -> None:
    with pytest.raises(Refused) as refused:
        read_latents(npy(LATENTS), SAID, guard, limits)
    assert refused.value.status == 413


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


HOSTILE = {
    "nothing": b"",
    "a pickle": pickle.dumps(Evil()),
    "a pickle in a .npy": npy(np.array([Evil()], dtype=object), allow_pickle=True),
    "integers": npy(LATENTS.astype(np.int32)),
    "truncated": npy(LATENTS)[:-1],
    "more than it says": npy(LATENTS) + b"\0",
    "magic only": b"\x93NUMPY",
    "huge header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "code in the header": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getpid()".ljust(32),
    "a zip": b"PK\x03\x04" + bytes(100),
    "no images": npy(LATENTS[:0]),
    "safetensors too long": (2**63).to_bytes(8, "little") + b"{}",
    "deep JSON": safetensors(b"[" * 5000),
    "no tensor": safetensors({}),
    "a shape that does not fit": safetensors(
        {"a": {"dtype": "F32", "shape": [2**40, 32, 4, 4], "data_offsets": [0, 4]}}, bytes(4)
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bodies_are_refused(
    guard: Guard, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused) as refused:
        read_latents(data, SAID, guard, Limits())
    assert refused.value.status == 422
    assert 0 < len(refused.value.reason) < 500
    assert capsys.readouterr().out == ""


VALID = [npy(LATENTS.astype("<f2")), tensor(LATENTS, "F32")]


def changed(data: bytes, place: int, new: bytes, instead: int) -> bytes:
    return data[:place] + new + data[place + instead :]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda tail: b"\x93NUMPY\x01\x00" + tail),
        st.builds(
            changed,
            st.sampled_from(VALID),
            st.integers(0, 160),
            st.binary(max_size=4),
            st.integers(0, 2),
        ),
    )
)
def test_any_bytes_are_latents_or_refused(guard: Guard, data: bytes) -> None:
    try:
        found = read_latents(data, SAID, guard, Limits())
    except Refused:
        return
    assert found.latents.dtype.kind == "f"
    assert found.latents.nbytes <= 2 * len(data)
