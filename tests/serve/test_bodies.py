"""The example's reader of request bodies: what it reads, and what it refuses."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from bodies import MAX_HEADER, BodyError, read_body
from hypothesis import given, settings
from hypothesis import strategies as st


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), **options)
    return stream.getvalue()


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


LATENTS = np.random.default_rng(0).normal(size=(2, 4, 3, 5))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy(dtype: str, version: tuple[int, int]) -> None:
    array = LATENTS.astype(dtype)
    body = read_body(npy(array, version=version))
    np.testing.assert_array_equal(body.array, array)
    assert (body.space, body.scaled) == (None, None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_safetensors_with_its_convention(dtype: str) -> None:
    written = pytest.importorskip("safetensors.numpy", reason="writes the file")
    array = LATENTS.astype(dtype)
    data = written.save({"latents": array}, metadata={"space": "sdxl", "scaled": "false"})
    body = read_body(data)
    np.testing.assert_array_equal(body.array, array)
    assert (body.space, body.scaled) == ("sdxl", False)


def test_safetensors_as_the_library_saves_latents(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch", reason="latents are saved with torch")
    from latentguard import Latents
    from latentguard.files import save_latents

    tensor = torch.randn(2, 32, 4, 4)
    save_latents(tmp_path / "l.safetensors", Latents(tensor, "flux2", scaled=True))
    body = read_body((tmp_path / "l.safetensors").read_bytes())
    np.testing.assert_array_equal(body.array, tensor.numpy())
    assert (body.space, body.scaled) == ("flux2", True)


def test_bfloat16() -> None:
    values = np.array([1.0, -2.5, 0.0078125, np.inf], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    body = read_body(safetensors({"x": entry("BF16", [1, 4], 8)}, halves))
    np.testing.assert_array_equal(body.array, values[None])


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


HOSTILE = {
    "nothing": b"",
    "a pickle": pickle.dumps(Evil()),
    "a pickle in a .npy": npy(np.array([Evil()], dtype=object), allow_pickle=True),
    "integers": npy(np.zeros((1, 4, 2, 2), np.int32)),
    "complex": npy(np.zeros((1, 4, 2, 2), np.complex64)),
    "records": npy(np.zeros(3, [("a", "f4")])),
    "fortran": npy(np.asfortranarray(LATENTS)),
    "truncated .npy": npy(LATENTS)[:-1],
    "more than .npy": npy(LATENTS) + b"\0",
    "header only": npy(LATENTS)[:60],
    "magic only": b"\x93NUMPY",
    "unknown version": b"\x93NUMPY\x09\x00" + npy(LATENTS)[8:],
    "huge header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "code in the header": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getpid()".ljust(32),
    "huge shape": npy(LATENTS).replace(b"(2, 4, 3, 5)", b"(2, 4, 3,5e)"),
    "a zip": b"PK\x03\x04" + bytes(100),
    "safetensors too long": (2**63).to_bytes(8, "little") + b"{}",
    "safetensors long header": safetensors(b" " * (MAX_HEADER + 1)),
    "not JSON": safetensors(b"{"),
    "deep JSON": safetensors(b"[" * 5000),
    "a list": safetensors([]),
    "no tensor": safetensors({}),
    "two tensors": safetensors({"a": entry("F32", [1], 4), "b": entry("F32", [1], 4)}, bytes(4)),
    "a tensor of text": safetensors({"a": "b"}),
    "no dtype": safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a dtype that is a list": safetensors({"a": entry([], [1], 4)}, bytes(4)),  # type: ignore[arg-type]
    "an integer dtype": safetensors({"a": entry("I32", [1], 4)}, bytes(4)),
    "negative": safetensors({"a": entry("F32", [-1], -4)}, bytes(4)),
    "truth as a size": safetensors({"a": {**entry("F32", [1], 4), "shape": [True]}}, bytes(4)),
    "shape that does not fit": safetensors({"a": entry("F32", [2**40, 2**20], 4)}, bytes(4)),
    "offsets beyond": safetensors({"a": entry("F32", [2], 8)}, bytes(4)),
    "offsets backwards": safetensors({"a": {**entry("F32", [1], 4), "data_offsets": [4, 0]}}),
    "many axes": safetensors({"a": entry("F32", [1] * 9, 4)}, bytes(4)),
    "metadata of numbers": safetensors({"__metadata__": 3, "a": entry("F32", [1], 4)}, bytes(4)),
    "scaled that is a guess": safetensors(
        {"__metadata__": {"scaled": "maybe"}, "a": entry("F32", [1], 4)}, bytes(4)
    ),
    "a space that is a list": safetensors(
        {"__metadata__": {"space": [1]}, "a": entry("F32", [1], 4)}, bytes(4)
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bodies_are_refused(data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BodyError) as refused:
        read_body(data)
    assert 0 < len(str(refused.value)) < 400
    assert capsys.readouterr().out == ""


VALID = [npy(LATENTS.astype("<f2")), safetensors({"x": entry("F32", [1, 2], 8)}, bytes(8))]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda tail: b"\x93NUMPY\x01\x00" + tail),
        st.tuples(st.sampled_from(VALID), st.integers(0, 130), st.binary(max_size=4)).map(
            lambda change: change[0][: change[1]] + change[2] + change[0][change[1] :]
        ),
        st.tuples(st.sampled_from(VALID), st.integers(0, 130), st.integers(0, 255)).map(
            lambda change: change[0][: change[1]] + bytes([change[2]]) + change[0][change[1] + 1 :]
        ),
    )
)
def test_any_bytes_are_latents_or_refused(data: bytes) -> None:
    try:
        body = read_body(data)
    except BodyError:
        return
    assert body.array.dtype.kind == "f"
    assert body.array.nbytes <= 2 * len(data)
