"""A policy's scorer as an ONNX graph: latents in, scores out, the concept bank as its inputs."""

from __future__ import annotations

from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard import ops
from latentguard.encoders import strongest_view, traits
from latentguard.errors import ModelError
from latentguard.ops.onnx import OPSET, translations
from latentguard.scorer import Scorer
from latentguard.spaces import LatentSpace
from latentguard.text import first_line

BANK = ("bank.embeddings", "bank.segments", "bank.contrast", "bank.contrast_segments")
"""The four arrays that a policy's prompts become; see `ConceptBank`."""


class _Moderator(torch.nn.Module):
    """Latents [B, C, H, W] float32 and a concept bank to scores."""

    def __init__(self, scorer: Scorer, scaled: bool, heatmaps: bool) -> None:
        super().__init__()
        self._encoder = scorer.encoder
        module = traits(scorer.encoder).module
        if module is not None:
            self.weights = module
        self._space = LatentSpace.get(scorer.encoder.space)
        self._scaled = scaled
        self._heatmaps = heatmaps

    def forward(
        self,
        latents: Tensor,
        embeddings: Tensor,
        segments: Tensor,
        contrast: Tensor,
        ranges: Tensor,
    ) -> tuple[Tensor, ...]:
        encoder, head = self._encoder, self._encoder.head
        if encoder.needs_scaled != self._scaled:
            convert = self._space.to_scaled if encoder.needs_scaled else self._space.to_raw
            latents = convert(latents)
        # Nobody reads the places' tokens without heat maps, and no engine leaves them out itself.
        options = {"tokens": self._heatmaps} if traits(encoder).pools else {}
        features = encoder.features(latents, **options)  # type: ignore[arg-type]
        if features.tiles != 1 and not features.lead:
            raise ModelError("a model that reads an image in tiles cannot be exported")
        shared = (head.ln_weight, head.ln_bias, head.eps, head.projection)
        bank = (embeddings, segments, contrast, ranges)
        scale = encoder.logit_scale
        scores = ops.concept_similarity(features.pooled, *shared, *bank, scale)
        scores = strongest_view(features.tiles, *scores, features.lead, scale)
        pooled = features.pooled[:: features.tiles]
        if head.ln_weight is not None:
            shape = pooled.shape[-1:]
            pooled = F.layer_norm(pooled, shape, head.ln_weight, head.ln_bias, head.eps)
        if head.projection is not None:
            pooled = pooled @ head.projection
        outputs = (*scores, F.normalize(pooled, dim=-1))
        if not self._heatmaps:
            return outputs
        margin = ops.concept_heatmap(features.tokens, *shared, *bank)
        return (*outputs, margin.reshape(*margin.shape[:2], *features.grid))


def build(
    scorer: Scorer,
    height: int,
    width: int,
    *,
    scaled: bool,
    heatmaps: bool,
    dynamic: bool,
    channels: int | None = None,
    smallest: int = 8,
) -> onnx.ModelProto:
    """The graph in float32, with `latents` and the bank (`BANK`) as inputs.

    The number of images, prompts, contrast prompts and concepts is open; with `dynamic` the height
    and width are, too, from `smallest` on. channels: of `latents`; None is those of the space.
    Raises ModelError where the model cannot be exported so.
    """
    encoder = scorer.encoder
    channels = channels or LatentSpace.get(encoder.space).channels
    latents = torch.zeros(2, channels, height, width)
    # Example sizes of 1 would be taken for constants.
    arguments = (latents, *(_at_least_two(tensor) for tensor in _tensors(scorer)))
    sides: dict[int, Any] = {0: torch.export.Dim("images", min=1)}
    if dynamic:
        sides |= {
            2: torch.export.Dim("height", min=smallest),
            3: torch.export.Dim("width", min=smallest),
        }
    shapes = (
        sides,
        {0: torch.export.Dim("prompts", min=1)},
        {0: torch.export.Dim("concepts", min=1)},
        {0: torch.export.Dim("contrast", min=1)},
        # As many as there are concepts. To name the axis twice would be a warning.
        {0: torch.export.Dim.AUTO},
    )
    names = ["probability", "margin", "best_prompt", "embedding"]
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _Moderator(scorer, scaled, heatmaps).eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=translations(),
                dynamic_shapes=shapes,
                input_names=["latents", *BANK],
                output_names=[*names, "heatmap"] if heatmaps else names,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        if dynamic:
            raise ModelError(not_open(encoder.name)) from error
        raise ModelError(f"{encoder.name} cannot be exported: {_cause(error)}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _check_open(model, encoder.name, dynamic)
    return model


def _cause(error: BaseException) -> str:
    """The first line of what was raised while the model was traced."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _check_open(model: onnx.ModelProto, name: str, dynamic: bool) -> None:
    """The tracer makes a constant of a size that the model branches on, and says nothing."""
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    if not sizes[0].dim_param or (dynamic and not all(sides.dim_param for sides in sizes[2:])):
        if sizes[0].dim_param:
            raise ModelError(not_open(name))
        raise ModelError(f"{name} cannot be exported with an open number of images")
    for bank in model.graph.input[1:]:
        if not bank.type.tensor_type.shape.dim[0].dim_param:
            raise ModelError(f"{name} cannot be exported with a concept bank of any size")


def not_open(name: str) -> str:
    """What to say of a model whose graph depends on the size of latents."""
    return (
        f"{name} reads latents of different sizes in different ways and cannot be exported with "
        "open height and width: give them in latent cells (--height 64 --width 64 for 512 pixels)"
    )


def attach_bank(model: onnx.ModelProto, scorer: Scorer) -> None:
    """Turn the bank's inputs into initializers of the same names, or replace those."""
    for group in (model.graph.input, model.graph.initializer):
        kept = [item for item in group if item.name not in BANK]
        del group[:]
        group.extend(kept)
    for name, array in bank_arrays(scorer).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))


def bank_arrays(scorer: Scorer) -> dict[str, Any]:
    """The bank as inputs of the graph that `build` gives."""
    return {
        name: tensor.detach().cpu().numpy()
        for name, tensor in zip(BANK, _tensors(scorer), strict=True)
    }


def _tensors(scorer: Scorer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bank = scorer.bank
    return (
        bank.embeddings.float(),
        bank.segments,
        bank.contrast.float(),
        bank.contrast_segments,
    )


def _at_least_two(tensor: Tensor) -> Tensor:
    return tensor if len(tensor) > 1 else torch.cat([tensor, tensor])
