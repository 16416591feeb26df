"""null, the template operator, on every back end against the reference in float64.

A new operator's test is this one with its own cases. What else an operator must bring (schema, fake
kernel, gradient, ONNX translation, clear errors) is asked of all of them by test_registration.py.
"""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, RELATIVE, Null, Reference, move, relative

EXACT = Reference()

# Sizes that no block and no 16-byte piece divides, one element, and more than one block.
CASES = [Null(), Null((1,), -2.0), Null((5, 1031), 0.25), Null((16, 256), 0.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_null(backend: Reference, case: Null, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    want = EXACT.null(move(arguments, torch.float64))
    got = backend.null(arguments)
    assert got.dtype == dtype
    assert got.shape == case.shape
    assert relative(got, want) <= RELATIVE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_null_backward(backend: Reference, case: Null, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    grad = torch.randn(case.shape).to(dtype)
    want = EXACT.null_backward(grad.double(), move(arguments, torch.float64))
    got = backend.null_backward(grad, arguments)
    assert got.dtype == dtype
    assert relative(got, want) <= RELATIVE[dtype]


def test_damage_passes_through(backend: Reference) -> None:
    """A NaN comes out as a NaN, at its place and no other."""
    arguments = Null((4, 9)).arguments(torch.float32)
    arguments["x"][2, 3] = float("nan")
    out = backend.null(arguments)
    assert bool(out[2, 3].isnan())
    assert int(out.isnan().sum()) == 1
