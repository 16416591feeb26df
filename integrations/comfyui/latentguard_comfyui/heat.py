"""Where a concept is: a heat map over the linear view of latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard import Latents, PolicyError, Scorer
from latentguard.spaces import rgb_preview

HOT = (1.0, 0.2, 0.0)
DIMMED = 0.6
"""How bright the view is under the heat."""
OPAQUE = 0.75
"""How much of the view the strongest heat hides."""


def heat(scorer: Scorer, latents: Latents, concept: str = "") -> tuple[Tensor, list[str]]:
    """How strongly each cell matches, [B, h, w] in 0 to 1, where 0.5 is the concept's threshold;
    and which concept each image was looked at for.

    concept: its id; "" is the one that is nearest to its threshold, or furthest above.
    Raises PolicyError where the policy has none of that name, or none that the model sees.
    """
    ids = list(scorer.rules.ids)
    seen = [name for k, name in enumerate(ids) if scorer.bank.covered[k]]
    if concept and concept not in seen:
        raise PolicyError(
            f"policy '{scorer.policy.name}' has no concept {concept!r:.60} that model "
            f"{scorer.encoder.name} sees: choose one of {', '.join(seen)}"
        )
    margins = torch.from_numpy(scorer.heatmaps(latents))
    limits = torch.tensor([_threshold(scorer, k) for k in range(len(ids))])
    if concept:
        chosen = [ids.index(concept)] * len(latents)
    else:
        gaps = scorer.score(latents).margin.float().cpu() - limits
        gaps[:, [k for k, name in enumerate(ids) if name not in seen]] = -torch.inf
        chosen = gaps.argmax(1).tolist()
    rows = torch.arange(len(latents))
    over = margins[rows, chosen] - limits[chosen][:, None, None]
    return torch.sigmoid(over * scorer.encoder.logit_scale), [ids[k] for k in chosen]


def painted(latents: Latents, heats: Tensor, view: bool) -> tuple[Tensor, Tensor]:
    """An IMAGE [B, H, W, 3] and a MASK [B, H, W] in the size of the decoded picture, 0 to 1.

    view: paint over the linear view; otherwise over black, also in a space without a view.
    """
    factor = latents.space.vae_scale_factor
    size = (latents.height * factor, latents.width * factor)
    mask = F.interpolate(heats[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    ground = torch.zeros(len(latents), *size, 3)
    if view and latents.space.standard.rgb_view is not None:
        ground = torch.from_numpy(rgb_preview(latents, factor)).float() / 255
    share = OPAQUE * mask[..., None]
    return ground * DIMMED * (1 - share) + torch.tensor(HOT) * share, mask


def _threshold(scorer: Scorer, k: int) -> float:
    try:
        return scorer.bound.threshold(k)
    except ValueError:  # a rate that was not calibrated for this model: the verdict tells of it
        return 0.0
