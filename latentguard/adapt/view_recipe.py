"""Training nano-view: the pixel network behind a linear view, on views with errors.

Two stages: the network on perfect views with white noise, which is cheap; then on views of our own
autoencoders' latents and of pictures, with the errors of views.py put on. The targets are the
teacher's, of the clean picture. A filter before the network, trained to give perfect views of such
ones, was tried and helped nothing: what a view lacks is not to be had from its three numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from latentguard.adapt.cache import Cache
from latentguard.adapt.train import Recipe, RgbRecipe, Stage, divergence, held_rows
from latentguard.adapt.view_cache import Encoded, perfect_views
from latentguard.adapt.views import Errors
from latentguard.encoders.nano_net import RgbViewNet

LARGE = 0.4
"""Share of batches at the largest size."""
OWN = 0.6
"""Share of batches whose views are of our own autoencoders' latents; the others are of pictures."""
LOOSENESS = 0.25
BLOCKS = 6
"""Of the trunk, from its start, that are trained on views, besides the stem."""


class ViewRecipe(RgbRecipe):
    """RgbRecipe and a second stage, on views of latents with errors; see the module's text."""

    def __init__(
        self,
        cache: Cache,
        recipe: Recipe,
        config: dict[str, Any],
        encoded: Sequence[Encoded],
        errors: Errors | None = None,
    ) -> None:
        super().__init__(cache, recipe, config)
        self.encoded = encoded
        self.errors = errors or Errors()
        sample = cache.batch("heads", np.arange(min(128, cache.meta.done)))
        std = sample.std((0, 2, 3))
        self.head_std = std.clamp_min(0.3 * float(std.mean())).view(-1, 1, 1)

    def stages(self) -> list[Stage]:
        rows = self.cache.meta.done
        # A view is another picture, not another world: what the later layers know of a thousand
        # classes stays, as few photos would take some of it away.
        net = self.net
        early = nn.ModuleList([net.stem, *net.trunk.blocks[:BLOCKS]])
        kept = {id(p) for n, p in net.trunk.named_parameters() if "depthwise.conv.weight" in n}
        trained = [p for p in early.parameters() if id(p) not in kept]
        group = {"params": trained, "lr": self.recipe.view_lr}
        return [
            *super().stages(),
            Stage("views", [group], self.recipe.view_passes, self.views, rows),
        ]

    def views(self, net: nn.Module, rows: NDArray[np.intp], training: bool) -> Tensor:
        """The loss of the first stage plus the head map's error, on views with errors."""
        assert isinstance(net, RgbViewNet)
        view, rows = self._views(rows, training)
        wanted = self.cache.batch("heads", rows)
        if training and bool(torch.rand(()) < 0.5):
            view, wanted = view.flip(-1), wanted.flip(-1)
        head = net.from_view(view.contiguous(memory_format=torch.channels_last))
        error = (head.mean((2, 3)) - wanted.mean((2, 3))) / self.pooled_std
        places = F.adaptive_avg_pool2d(wanted, (head.shape[-2], head.shape[-1]))
        dense = ((head - places) / self.head_std).square().mean()
        return divergence(net, head, wanted) + error.square().mean() + 0.5 * dense

    def _views(self, rows: NDArray[np.intp], training: bool) -> tuple[Tensor, NDArray[np.intp]]:
        """Views of about these rows, and whose they are, in rising order."""
        rows = np.sort(rows)
        if not training:
            return self._validation_views(rows)
        own = bool(self.encoded) and bool(torch.rand(()) < OWN)
        small, large = self.recipe.view_cells[0], self.recipe.view_cells[-1]
        cells = large if bool(torch.rand(()) < LARGE) else small
        if not own:
            perfect, crops = perfect_views(self.cache, rows, cells)
            return self.errors.on(perfect, perfect, crops), rows
        # A picture at 1024 px that gets the error of another at 512 px, mirrored, or its own.
        mirrored = cells == 2 * small and bool(torch.rand(()) < 0.5)
        sources = [e for e in self.encoded if e.cells == (small if mirrored else cells)]
        source = sources[int(torch.randint(len(sources), ()))]
        first = int(np.searchsorted(source.rows, held_rows(self.cache.meta.done)))
        places = np.sort(first + rows % (len(source.rows) - first))
        rows = source.rows[places]
        looseness = LOOSENESS * float(torch.rand(()))
        view = source.views(places, looseness)
        perfect, crops = perfect_views(self.cache, rows, source.cells)
        if mirrored:
            error = (view - perfect)[torch.randperm(len(view))]
            error = torch.cat([error, error.flip(-1)], -1)
            error = torch.cat([error, error.flip(-2)], -2)
            perfect, crops = perfect_views(self.cache, rows, cells)
            view = perfect + error
        return self.errors.on(view, perfect, crops), rows

    def _validation_views(self, rows: NDArray[np.intp]) -> tuple[Tensor, NDArray[np.intp]]:
        """Views of own latents without further errors; of pictures where there are none."""
        if self.encoded:
            source = self.encoded[int(rows[0]) // 32 % len(self.encoded)]
            places = np.flatnonzero(np.isin(source.rows, rows))
            if len(places):
                rows = source.rows[places]
                return source.views(places), rows
        perfect, _ = perfect_views(self.cache, rows, self.recipe.view_cells[0])
        return perfect, rows
