"""What every operator must bring: schema, kernels, fake kernel, autograd, ONNX, clear errors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import ops_cases
import pytest
import torch
from ops_cases import Match, Null, Patch, Reference
from torch import Tensor

from latentguard import ops
from latentguard.ops import library, onnx, reference

FORWARD = tuple(ops.__all__)
ALL = (*FORWARD, *(name + "_backward" for name in FORWARD))
SCALE = 10.0


def arguments(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Positional arguments of a forward operator."""
    if name == "null":
        return list(Null().arguments(dtype).values())
    if name == "patch_embed":
        return list(Patch().arguments(dtype).values())
    if name == "concept_similarity":
        return [*Match().arguments(dtype).values(), SCALE]
    return list(Match(positions=6).arguments(dtype).values())


def test_every_operator_is_complete() -> None:
    dump = torch._C._dispatch_dump
    table = onnx.translations()
    assert set(ALL) == set(library.SCHEMAS)
    for name in ALL:
        registered = dump(f"latentguard::{name}")
        for key in ("CompositeExplicit",) if library.extension is None else ("CPU", "CUDA"):
            assert key in registered, f"{name} has no {key} kernel"
        found = torch._library.simple_registry.singleton.find(f"latentguard::{name}")
        assert found.fake_impl.kernel is not None, f"{name} has no fake kernel"
        if name in FORWARD:
            overload = getattr(torch.ops.latentguard, name).default
            assert "Autograd" in registered, f"{name} has no backward"
            assert overload in table, f"{name} has no ONNX translation"
            assert callable(getattr(ops, name))
            assert callable(getattr(reference, name))


SIGNATURES = {
    "null": "(Tensor x, float scale) -> Tensor",
    "null_backward": "(Tensor grad, float scale) -> Tensor",
    "patch_embed": (
        "(Tensor latents, Tensor weight, Tensor class_embedding, Tensor positional_embedding, "
        "Tensor ln_weight, Tensor ln_bias, float eps, Tensor? scale=None, Tensor? shift=None, "
        "Tensor? noise=None, Tensor? alpha=None, Tensor? sigma=None) -> Tensor"
    ),
    "patch_embed_backward": (
        "(Tensor grad, Tensor latents, Tensor weight, Tensor positional_embedding, "
        "Tensor ln_weight, float eps, Tensor? scale=None, Tensor? shift=None, "
        "Tensor? noise=None, Tensor? alpha=None, Tensor? sigma=None) -> Tensor"
    ),
    "concept_similarity": (
        "(Tensor features, Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor? projection, "
        "Tensor concepts, Tensor segments, Tensor contrast, Tensor contrast_segments, "
        "float logit_scale, bool save=False) -> (Tensor probability, Tensor margin, "
        "Tensor best_prompt, Tensor best_contrast, Tensor projected)"
    ),
    "concept_similarity_backward": (
        "(Tensor? grad_probability, Tensor? grad_margin, Tensor features, Tensor? ln_weight, "
        "float eps, Tensor? projection, Tensor concepts, Tensor contrast, Tensor probability, "
        "Tensor best_prompt, Tensor best_contrast, Tensor projected, float logit_scale) -> Tensor"
    ),
    "concept_heatmap": (
        "(Tensor tokens, Tensor? ln_weight, Tensor? ln_bias, float eps, Tensor? projection, "
        "Tensor concepts, Tensor segments, Tensor contrast, Tensor contrast_segments, "
        "bool save=False) -> (Tensor margin, Tensor best_prompt, Tensor best_contrast, "
        "Tensor projected)"
    ),
    "concept_heatmap_backward": (
        "(Tensor grad, Tensor tokens, Tensor? ln_weight, float eps, Tensor? projection, "
        "Tensor concepts, Tensor contrast, Tensor best_prompt, Tensor best_contrast, "
        "Tensor projected) -> Tensor"
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_schemas_stay_as_they_are(name: str) -> None:
    """They are what exported programs and other people's calls hold on to."""
    want = torch._C.parse_schema(f"latentguard::{name}{SIGNATURES[name]}")
    assert str(getattr(torch.ops.latentguard, name).default._schema) == str(want)


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck(name: str) -> None:
    args = arguments(name)
    args[0].requires_grad_()
    for extra in ((), (True,)) if name.startswith("concept") else ((),):
        torch.library.opcheck(getattr(torch.ops.latentguard, name).default, (*args, *extra))


@pytest.mark.parametrize("name", ["concept_similarity", "concept_heatmap"])
def test_backward_without_saved_rows(name: str) -> None:
    """A direct call that saved nothing computes its forward again, and gets the same gradient."""
    gradients = []
    for save in (False, True):
        args = arguments(name)
        args[0].requires_grad_()
        out = getattr(torch.ops.latentguard, name)(*args, save)
        assert (out[-1].numel() > 0) == save
        margin = out[1 if name == "concept_similarity" else 0]
        gradients.append(torch.autograd.grad(margin.square().sum(), args[0])[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", FORWARD)
def test_compiles_without_graph_breaks(name: str) -> None:
    function = getattr(ops, name)

    def loss(x: Tensor, *rest: Any) -> Tensor:
        out = function(x, *rest)
        return (out[1] if isinstance(out, tuple) else out).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    args = arguments(name)
    eager, traced = (args[0].clone().requires_grad_() for _ in range(2))
    loss(eager, *args[1:]).backward()
    compiled(traced, *args[1:]).backward()
    torch.testing.assert_close(traced.grad, eager.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORWARD)
def test_gradcheck_of_the_reference(name: str) -> None:
    args = arguments(name, torch.float64)
    small = args[0][:1].clone().requires_grad_()
    rest = [a[:1] if k in (9, 10, 11) and name == "patch_embed" else a for k, a in enumerate(args)]
    function = getattr(ops, name)

    def differentiable(x: Tensor) -> Any:
        out = function(x, *rest[1:])
        return out[:2] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(differentiable, (small,), fast_mode=True)


@pytest.mark.parametrize("name", FORWARD)
def test_written_out_backward_is_autograds(name: str) -> None:
    args = arguments(name, torch.float64)
    x = args[0].requires_grad_()
    out = getattr(reference, name)(*args)
    margins = {"concept_similarity": 2, "concept_heatmap": 1}
    out = out[: margins[name]] if isinstance(out, tuple) else (out,)
    grads = tuple(torch.randn_like(o) for o in out)
    (want,) = torch.autograd.grad(out, x, grads)
    exact, named = Reference(), Patch() if name == "patch_embed" else Match(positions=6)
    with torch.no_grad():
        if name == "null":
            got = exact.null_backward(grads[0], Null().arguments(torch.float64))
        elif name == "patch_embed":
            got = exact.patch_embed_backward(grads[0], named.arguments(torch.float64))
        elif name == "concept_heatmap":
            a = named.arguments(torch.float64)
            got = exact.heatmap_backward(grads[0], a, exact.heatmap(a))
        else:
            a = Match().arguments(torch.float64)
            got = exact.similarity_backward(grads, a, SCALE, exact.similarity(a, SCALE))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_noise_gets_its_gradient() -> None:
    case = Patch().arguments(torch.float32)
    both = []
    for dtype in (torch.float32, torch.float64):
        a = ops_cases.move(case, dtype)
        noise = a["noise"] = a["noise"].clone().requires_grad_()
        ops.patch_embed(**a).square().sum().backward()
        both.append(noise.grad)
    assert ops_cases.relative(both[0], both[1]) <= 1e-5


def test_weights_get_gradients_through_the_reference() -> None:
    args = arguments("patch_embed")
    args[1].requires_grad_()
    ops.patch_embed(*args).sum().backward()
    assert args[1].grad is not None
    args = arguments("concept_similarity")
    args[4].requires_grad_()
    ops.concept_similarity(*args)[1].sum().backward()
    assert args[4].grad is not None


@pytest.mark.skipif(ops_cases.needs_extension, reason=ops_cases.EXTENSION_REASON)
@pytest.mark.parametrize("name", [name for name in FORWARD if name != "null"])  # has no weights
def test_a_direct_call_refuses_the_gradient_of_weights(name: str) -> None:
    args = arguments(name)
    args[1].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"latentguard\.ops\.{name}"):
        getattr(torch.ops.latentguard, name)(*args)


@pytest.mark.parametrize("name", FORWARD)
def test_empty_batch(name: str) -> None:
    args = arguments(name)
    args[0] = args[0][:0]
    if name == "patch_embed":
        args[9:12] = [a[:0] for a in args[9:12]]
    out = getattr(ops, name)(*args)
    for tensor in out if isinstance(out, tuple) else (out,):
        assert tensor.shape[0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)
@pytest.mark.parametrize("name", FORWARD)
def test_a_cuda_graph_replays_forward_and_backward(name: str) -> None:
    first, *rest = (a.cuda() if isinstance(a, Tensor) else a for a in arguments(name))
    x = torch.zeros_like(first).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = getattr(ops, name)(x, *rest)
        out = out[1] if isinstance(out, tuple) else out
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(first)
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=1e-5, atol=1e-6)


def test_any_strides_and_offsets() -> None:
    args = arguments("patch_embed")
    want = ops.patch_embed(*args)
    args[0] = args[0].to(memory_format=torch.channels_last)
    args[1] = torch.cat((torch.zeros(1), args[1].flatten()))[1:].view(args[1].shape)
    args[3] = args[3].t().contiguous().t()
    torch.testing.assert_close(ops.patch_embed(*args), want)


MISTAKES = [
    ("null", 0, lambda t: t.int(), "`x` must be"),
    ("null", 1, lambda t: float("inf"), "`scale` must be a finite number, got inf"),
    ("patch_embed", 0, lambda t: t[0], "`latents` must be of shape [*, *, *, *]"),
    ("patch_embed", 0, lambda t: t[..., :-1], "`latents` must be a multiple of the patch (4)"),
    ("patch_embed", 0, lambda t: t.int(), "`latents` must be"),
    ("patch_embed", 1, lambda t: t.half(), "`weight` must be of"),
    ("patch_embed", 1, lambda t: t[:-1], "`weight` must be of a width that is a multiple of 64"),
    ("patch_embed", 1, lambda t: t[..., :3], "`weight` must be a square patch"),
    ("patch_embed", 2, lambda t: t[:-1], "`class_embedding` must be of shape [64], got [63]"),
    ("patch_embed", 3, lambda t: t[:-1], "`positional_embedding` must be of shape [7, 64]"),
    ("patch_embed", 7, lambda t: t[:-1], "`scale` must be of shape [4] or, packed 2x2, [16]"),
    ("patch_embed", 11, lambda t: None, "`sigma` must be given together with `noise`"),
    ("concept_similarity", 0, lambda t: t[0], "`features` must be of shape [*, *]"),
    ("concept_similarity", 2, lambda t: None, "`ln_bias` must be given together with `ln_weight`"),
    ("concept_similarity", 5, lambda t: t[:, 1:], "`concepts` must be of shape [*, 32]"),
    ("concept_similarity", 6, lambda t: t.long(), "`segments` must be of dtype"),
    ("concept_similarity", 8, lambda t: t[1:], "`contrast_segments` must be of shape [3, 2]"),
    ("concept_heatmap", 0, lambda t: t[0], "`tokens` must be of shape [*, *, *]"),
]


@pytest.mark.parametrize(("name", "place", "change", "message"), MISTAKES)
def test_mistakes_are_named(name: str, place: int, change: Any, message: str) -> None:
    args = arguments(name)
    args[place] = change(args[place])
    with pytest.raises(RuntimeError, match=re.escape(f"`{name}`: {message}")):
        getattr(torch.ops.latentguard, name)(*args)


class _Module(torch.nn.Module):
    def __init__(self, name: str, rest: list[Any]) -> None:
        super().__init__()
        self.function, self.rest = getattr(ops, name), rest
        for place, value in enumerate(rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"b{place}", value)

    def forward(self, x: Tensor) -> Any:
        rest = [getattr(self, f"b{i}", value) for i, value in enumerate(self.rest)]
        return self.function(x, *rest)


@pytest.mark.parametrize("name", FORWARD)
def test_onnx_translation(name: str, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    args = arguments(name)
    if name == "patch_embed":  # noise levels belong to one image: not with a dynamic batch
        args[9:12] = [None] * 3
    module = _Module(name, args[1:]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (args[0],),
            dynamo=True,
            custom_translation_table=onnx.translations(),
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None
        program.save(str(tmp_path / "op.onnx"))
        session = runtime.InferenceSession(
            str(tmp_path / "op.onnx"), providers=["CPUExecutionProvider"]
        )
        assert all(not node.domain for node in program.model.graph), "only standard operators"
        for rows in (1, 2):
            x = args[0][:rows]
            want = module(x)
            got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            for right, found in zip(
                want if isinstance(want, tuple) else (want,), got, strict=False
            ):
                np.testing.assert_allclose(found, right.numpy(), atol=5e-6)
