"""Every operator on every back end against the reference in float64, outputs poisoned first."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, MARGIN, RELATIVE, Match, Patch, Reference, move, relative

EXACT = Reference()

PATCHES = [
    Patch(),
    Patch(patch=2, channels=3, height=4, width=6, noise=False),  # 12 values a patch: unaligned
    Patch(patch=8, height=24, width=56, dim=128, affine=False),  # 21 tokens: a partial tile
    Patch(patch=16, channels=3, height=16, width=32, dim=192, noise=False),  # depth 768
    Patch(patch=2, channels=32, height=6, width=10, packed=True),  # FLUX.2's packed statistics
    Patch(batch=1, patch=2, height=2, width=2, dim=1536, affine=False, noise=False),
]
MATCHES = [
    Match(),
    Match(rows=17, dim=100, project=False, norm=False, prompts=150, contrasts=7, concepts=35),
    Match(rows=2, dim=72, width=40, prompts=2, contrasts=1, concepts=1, norm=False),
    Match(rows=5, dim=128, width=96, prompts=300, contrasts=140, concepts=4),
    Match(rows=1, dim=64, project=False, prompts=11, contrasts=3, concepts=11),
    # The widest rows, on either side of the projection; more than one part of a product's depth.
    Match(rows=2, dim=1536, width=24),
    Match(rows=2, dim=24, width=1536),
]
MAPS = [Match(rows=2, positions=9), Match(rows=1, positions=21, dim=48, project=False, concepts=2)]
# Keys of 520 concepts do not fit in shared memory, which takes the host layer ten seconds; 5,000
# prompts is far from what tests can run.
ONE_LAUNCH = [
    Match(rows=1, positions=20, prompts=140, contrasts=3),
    Match(rows=1, positions=17, dim=1536, width=40),
    Match(rows=1, positions=3, dim=40, width=1536),
    pytest.param(
        Match(rows=1, positions=17, dim=16, project=False, prompts=530, contrasts=2, concepts=520),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patch_embed(backend: Reference, case: Patch, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    want = EXACT.patch_embed(move(arguments, torch.float64))
    got = backend.patch_embed(arguments)
    assert got.dtype == dtype
    assert relative(got, want) <= RELATIVE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patch_embed_backward(backend: Reference, case: Patch, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    grad = torch.randn(EXACT.patch_embed(arguments).shape).to(dtype)
    want = EXACT.patch_embed_backward(grad.double(), move(arguments, torch.float64))
    got = backend.patch_embed_backward(grad, arguments)
    assert got.dtype == dtype
    assert relative(got, want) <= RELATIVE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MATCHES, ids=str)
def test_concept_similarity(backend: Reference, case: Match, dtype: torch.dtype) -> None:
    scale = 10.0
    arguments = case.arguments(dtype)
    want = EXACT.similarity(move(arguments, torch.float64), scale)
    got = backend.similarity(arguments, scale)
    assert float((got[1].double() - want[1]).abs().max()) <= MARGIN[dtype]
    # The sigmoid's slope is at most a quarter.
    assert float((got[0].double() - want[0]).abs().max()) <= MARGIN[dtype] * scale / 4 + 1e-6
    for found, right in ((got[2], want[2]), (got[3], want[3])):
        # Rounding may swap prompts that are as good as equal; float does not here.
        assert found.dtype == torch.int64
        assert (found == right).double().mean() >= (1.0 if dtype == torch.float32 else 0.9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MATCHES, ids=str)
def test_concept_similarity_backward(backend: Reference, case: Match, dtype: torch.dtype) -> None:
    scale = 10.0
    arguments = case.arguments(dtype)
    exact = move(arguments, torch.float64)
    out = EXACT.similarity(exact, scale)
    grads = (torch.randn(out[0].shape), torch.randn(out[0].shape))
    want = EXACT.similarity_backward(tuple(g.double() for g in grads), exact, scale, out)
    saved = (out[0].float(), out[1].float(), out[2], out[3], out[4].to(dtype))
    got = backend.similarity_backward(grads, arguments, scale, saved)
    assert got.dtype == dtype
    assert relative(got, want) <= RELATIVE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_concept_heatmap(backend: Reference, case: Match, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = move(arguments, torch.float64)
    want = EXACT.heatmap(exact)
    got = backend.heatmap(arguments)
    assert float((got[0].double() - want[0]).abs().max()) <= MARGIN[dtype]
    assert relative(got[3], want[3]) <= RELATIVE[dtype]
    assert torch.equal(backend.heatmap_without_saving(arguments), got[0])
    # In half types another prompt may be the best one where two are as good as equal, and its
    # gradient differs in kind: the backward is given the exact forward's.
    saved = (want[0].float(), want[1], want[2], want[3].to(dtype))
    grad = torch.randn(want[0].shape)
    gradient = backend.heatmap_backward(grad, arguments, saved)
    right = EXACT.heatmap_backward(grad.double(), exact, want)
    assert relative(gradient, right) <= RELATIVE[dtype]


@pytest.mark.parametrize("case", ONE_LAUNCH, ids=str)
def test_one_launch(backend: Reference, case: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "split_rows", 0, raising=False)
    arguments = case.arguments(torch.float32)
    want = EXACT.heatmap(move(arguments, torch.float64))[0]
    assert (
        float((backend.heatmap(arguments)[0].double() - want).abs().max()) <= MARGIN[torch.float32]
    )
    if case.concepts < 520:
        for dtype in (torch.float16, torch.bfloat16):
            half = case.arguments(dtype)
            want = EXACT.heatmap(move(half, torch.float64))[0]
            assert float((backend.heatmap(half)[0].double() - want).abs().max()) <= MARGIN[dtype]


def test_damage_is_not_outvoted(backend: Reference) -> None:
    arguments = Match().arguments(torch.float32)
    arguments["features"][1, 3] = float("nan")
    probability, margin, *_ = backend.similarity(arguments, 10.0)
    assert bool(margin[1].isnan().all())
    assert bool(probability[1].isnan().all())
    assert bool(margin[[0, 2]].isfinite().all())
    arguments = Match().arguments(torch.float32)
    arguments["concepts"][0, 0] = float("nan")
    _, margin, prompt, *_ = backend.similarity(arguments, 10.0)
    assert bool(margin[:, 0].isnan().all())
    assert bool((prompt[:, 0] == 0).all())
    assert bool(margin[:, 1:].isfinite().all())


def test_ranges_outside_the_bank_fail_closed(backend: Reference) -> None:
    arguments = Match(concepts=4, prompts=8).arguments(torch.float32)
    arguments["segments"] = torch.tensor([[0, 9], [-1, 2], [3, 3], [6, 8]], dtype=torch.int32)
    probability, margin, prompt, *_ = backend.similarity(arguments, 10.0)
    assert bool(margin[:, :3].isnan().all())
    assert bool(probability[:, :3].isnan().all())
    assert bool((prompt[:, :3] == -1).all())
    assert bool(margin[:, 3].isfinite().all())


def test_ties_go_to_the_first_prompt(backend: Reference) -> None:
    arguments = Match(prompts=300, concepts=1).arguments(torch.float32)
    arguments["concepts"][:] = arguments["concepts"][0].clone()
    _, _, prompt, against, _ = backend.similarity(arguments, 10.0)
    assert bool((prompt == 0).all())
    assert bool((against >= 0).all())
