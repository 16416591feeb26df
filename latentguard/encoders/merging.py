"""Token merging (Bolya et al., arXiv 2210.09461): like tokens become one, so that less is computed.

Between attention and MLP of a block every second patch token looks for the most similar of the
others, by its keys, and the most similar pairs become their average, weighted by the patches that
each stands for. Attention counts a token as often. The class token is never merged.

Plain PyTorch of static shapes (the counts are known beforehand), so that it compiles, exports to
standard operators and has gradients: which tokens merge is a choice, how they average is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the mean square of keys, for those that are 0."""


class Tokens(NamedTuple):
    """Tokens between two blocks.

    values: [B, 1 + n, D], the class token first.
    size: [B, 1 + n, 1], how many patches each stands for; None where each stands for itself.
    place: [B, N] int64, for each patch of the grid where in `values` its token is; None where
        they are in their order.
    """

    values: Tensor
    size: Tensor | None = None
    place: Tensor | None = None

    def restored(self) -> Tensor:
        """[B, 1 + N, D]: each patch of the grid has the token that it has become part of."""
        if self.place is None:
            return self.values
        return torch.cat((self.values[:, :1], _rows(self.values, self.place)), dim=1)


def schedule(share: float, patches: int, blocks: int) -> list[int]:
    """How many tokens merge in each block, so that `share` of the patches have when all is done.

    As many in each but the last, whose class token merging does not reach any more. No block
    merges more than half of the tokens that it has.
    """
    total, left, counts = round(share * patches), patches, []
    for block in range(1, blocks):
        until = total * block // (blocks - 1)
        counts.append(min(until - (patches - left), left // 2))
        left -= counts[-1]
    return [*counts, 0]


def merge(tokens: Tokens, keys: Tensor, count: int) -> Tokens:
    """`count` tokens fewer.

    Args:
        tokens: of n patch tokens, count <= n // 2.
        keys: [B, heads, 1 + n, d], those of the attention before.
    """
    values, size, place = tokens
    ones = values.new_ones(values.shape[0], values.shape[1], 1)
    size = ones if size is None else size
    kept, gone, target = match(keys, count)
    # Patch tokens 0, 2, 4 ... take in, 1, 3, 5 ... are kept or go into one of those.
    into, weight, single, times = values[:, 1::2], size[:, 1::2], values[:, 2::2], size[:, 2::2]
    slots = torch.arange(into.shape[1], device=values.device)
    chosen = (target[:, None, :] == slots[:, None]).to(values.dtype)  # [B, taking, count]
    times_gone = _rows(times, gone)
    total = weight + chosen @ times_gone
    mean = (into * weight + chosen @ (_rows(single, gone) * times_gone)) / total
    return Tokens(
        torch.cat((values[:, :1], _rows(single, kept), mean), dim=1),
        torch.cat((size[:, :1], _rows(times, kept), total), dim=1),
        _moved(place, kept, gone, target, values.shape[1] - 1),
    )


@torch.no_grad()
def match(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which merge: of the odd patch tokens those kept [B, m - count] in their order, those gone
    [B, count], and for each of the latter which of the even ones it goes into [B, count].

    Similar is what has a high cosine between keys [B, heads, 1 + n, d], averaged over heads.
    """
    metric = keys.mean(1)
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    # Not as a norm: exports keep all behind one in float32, as an embedding's is the end.
    metric = metric * (metric.square().mean(-1, keepdim=True) + EPS).rsqrt()
    similarity = metric[:, 2::2] @ metric[:, 1::2].transpose(1, 2)
    best, target = similarity.max(-1)
    order = best.argsort(-1, descending=True)
    gone, kept = order[:, :count], order[:, count:].sort(-1).values
    return kept, gone, target.gather(1, gone)


def _moved(
    place: Tensor | None, kept: Tensor, gone: Tensor, target: Tensor, patches: int
) -> Tensor:
    """Where patches have their tokens after a merge: behind the class token those kept, then
    those that took others in."""
    batch, first = kept.shape[0], 1 + kept.shape[1]
    if place is None:
        place = torch.arange(1, 1 + patches, device=kept.device).expand(batch, -1)
    stay = torch.arange(1, first, device=kept.device).expand(batch, -1)
    order = torch.cat((kept, gone), dim=1)
    odd = torch.zeros_like(order).scatter(1, order, torch.cat((stay, first + target), dim=1))
    of_odd = odd.gather(1, (place // 2 - 1).clamp(min=0))
    return torch.where(place % 2 == 1, first + place // 2, of_odd)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[B, n, D] and [B, m] to [B, m, D]; exported, whole rows are copied (GatherND)."""
    images = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[images, index]
