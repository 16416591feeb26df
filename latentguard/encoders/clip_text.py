"""CLIP's text tower and tokenizer, both open_clip's; imported when the first prompt is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.encoders.catalog import LatentClipConfig
from latentguard.errors import ModelError

# Prompts a forward pass: 64 x 77 tokens keep the activations of a 640-wide tower under 200 MB.
CHUNK = 64


class ClipText:
    """Prompts to unit vectors [P, dim]."""

    def __init__(self, config: LatentClipConfig, weights: dict[str, Tensor]) -> None:
        """`weights` has the text tower's own key names; ModelError if they do not fit strictly."""
        try:
            from open_clip.tokenizer import SimpleTokenizer
            from open_clip.transformer import TextTransformer
        except ImportError as error:
            raise ModelError(
                "prompts of a CLIP model need open_clip: pip install 'latentguard[torch]' "
                f"({error})"
            ) from error
        self.context_length = config.context_length
        self.tokenizer: Any = SimpleTokenizer(context_length=config.context_length)
        with torch.device("meta"):
            tower = TextTransformer(
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                width=config.text_width,
                heads=config.text_width // 64,
                layers=config.text_layers,
                output_dim=config.embed_dim,
            )
        try:
            tower.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelError(
                f"the weights do not fit the text tower of the installed open_clip: {error}"
            ) from error
        # The causal mask is not part of a state dict: it has to be made again off the meta device.
        device = weights["positional_embedding"].device
        mask = torch.full((config.context_length,) * 2, -torch.inf, device=device).triu(1)
        tower.register_buffer("attn_mask", mask, persistent=False)
        self.tower: Any = tower.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [P, context_length]; ModelError for a prompt that would be cut."""
        for text in texts:
            count = len(self.tokenizer.encode(text)) + 2
            if count > self.context_length:
                raise ModelError(
                    f"the prompt {_short(text)!r} has {count} tokens, the model reads "
                    f"{self.context_length} (start and end included): shorten it, a cut prompt "
                    "would silently mean something else"
                )
        ids: Tensor = self.tokenizer(list(texts))
        return ids

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 embeddings [P, dim], `CHUNK` prompts at a time."""
        mask = self.tower.attn_mask
        dim = self.tower.text_projection.shape[1]
        out = torch.empty(len(texts), dim, device=mask.device)
        if not texts:
            return out
        ids = self.tokenize(texts)
        lengths = ids.argmax(-1) + 1  # the end mark has the largest id
        # Attention is causal, so what follows the end mark changes nothing: prompts of like length
        # go together and are cut behind the longest of them.
        for chunk in torch.split(lengths.argsort(), CHUNK):
            longest = int(lengths[chunk].max())
            tokens = ids[chunk, :longest].to(mask.device)
            short = {"attn_mask": mask[:longest, :longest]}
            vectors = torch.func.functional_call(self.tower, short, (tokens,))
            out[chunk.to(mask.device)] = F.normalize(vectors.float(), dim=-1)
        return out


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
