"""BLIP-VQA, as the benchmark defines it, by transformers: the built-in evaluator, not the official.

Of each phrase of a prompt the model is asked "PHRASE?", and the probability of yes against no is
taken; the picture's score is the product over the phrases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentguard.encode.diffusers_vae import is_hub_name
from latentguard.errors import LatentsError, MissingExtraError, ModelError
from latentguard.evaluate.generate.generators import module_sha256
from latentguard.evaluate.generate.judging import Judgment
from latentguard.evaluate.t2i_compbench.phrases import phrases_sha256
from latentguard.text import first_line

OFFICIAL = "Salesforce/blip-vqa-capfilt-large"
"""Of the hub: what the benchmark's own weights are there."""
MAX_TOKENS = 35
"""Of a question, as in the benchmark's code."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class BlipVqa:
    """Scores a picture of T2I-CompBench's folder, whose name is its prompt.

    source: a folder that transformers' save_pretrained wrote, or a name on the hub, which is
        fetched. phrases: of each prompt.

    Raises MissingExtraError without transformers, and ModelError where there is no BLIP model for
    question answering.
    """

    name = "blip-vqa"

    def __init__(
        self, source: str, phrases: Mapping[str, Sequence[str]], device: str = "cpu"
    ) -> None:
        try:
            from transformers import AutoTokenizer, BlipForQuestionAnswering
        except ImportError as error:
            raise MissingExtraError(
                "the evaluator blip-vqa needs transformers: pip install 'latentguard[diffusers]'"
            ) from error
        if not Path(source).is_dir() and not is_hub_name(source):
            raise ModelError(
                f"no BLIP model at {source}: give a folder that transformers' save_pretrained "
                f"wrote, or OWNER/NAME of the Hugging Face hub, such as {OFFICIAL}"
            )
        try:
            model: Any = BlipForQuestionAnswering.from_pretrained(source)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # files, networks, configurations: all kinds
            raise ModelError(
                f"the evaluator blip-vqa needs a BLIP model for question answering, such as "
                f"{OFFICIAL}, and transformers cannot load {source!r}: {first_line(error)}"
            ) from error
        self._model = model.eval().to(device)
        self._start = int(model.decoder_start_token_id)
        words = self._tokenizer.get_vocab()
        vocabulary = int(model.config.text_config.vocab_size)
        # [DEC] begins an answer and [ENC], the next one, a question.
        if not {"yes", "no"} <= set(words) or self._start + 1 >= vocabulary:
            raise ModelError(f"{source}: its vocabulary has no yes, no, [DEC] and [ENC] as BLIP's")
        self._answers = torch.tensor([words["yes"], words["no"]], device=device)
        self._phrases = dict(phrases)
        self._sha256 = module_sha256(model)
        self._device = device

    def describe(self) -> dict[str, Any]:
        """The weights and what is asked, by digest."""
        return {
            "judge": self.name,
            "weights_sha256": self._sha256,
            "pixels": self._side,
            "phrases_sha256": phrases_sha256(self._phrases),
        }

    @property
    def _side(self) -> int:
        return int(self._model.config.vision_config.image_size)

    def judge(self, picture: Path, latents: Path | None) -> Judgment:
        """The product of the probabilities of yes; nothing is ever flagged."""
        prompt = picture.stem.rpartition("_")[0]
        if prompt not in self._phrases:
            raise LatentsError(f"{picture}: no phrases are known of the prompt {prompt[:80]!r}")
        questions = [question_of(phrase) for phrase in self._phrases[prompt]]
        yes = self.probabilities(picture, questions).tolist()
        why = ", ".join(f"{q} {p:.3f}" for q, p in zip(questions, yes, strict=True))
        return Judgment(False, round(float(np.prod(yes)), 6), why)

    @torch.inference_mode()
    def probabilities(self, picture: Path, questions: Sequence[str]) -> Tensor:
        """Of yes against no for each question, [Q] float32."""
        seen = self._model.vision_model(pixel_values=self._pixels(picture))[0]
        # One by one: the padding of shorter questions changes their answers in transformers.
        return torch.cat([self._yes(seen, question) for question in questions])

    def _yes(self, seen: Tensor, question: str) -> Tensor:
        """[1], of a picture's states [1, places, D]."""
        ids = self._tokenizer(
            question, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids.to(self._device)
        ids[:, 0] = self._start + 1
        states = self._model.text_encoder(input_ids=ids, encoder_hidden_states=seen)[0]
        start = torch.full((1, 1), self._start, device=self._device)
        answer = self._model.text_decoder(input_ids=start, encoder_hidden_states=states)
        # Of the shares of the whole vocabulary, these two alone.
        shares: Tensor = answer.logits[:, 0, self._answers].float().softmax(-1)
        return shares[:, 0]

    def _pixels(self, picture: Path) -> Tensor:
        """[1, 3, S, S], as the benchmark's code has it but for the number of pixels."""
        from PIL import Image

        size = (self._side, self._side)
        with Image.open(picture) as opened:
            rgb = opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        values = (np.asarray(rgb, np.float64) / 255 - np.array(_MEAN)) / np.array(_STD)
        return torch.from_numpy(values).float().permute(2, 0, 1)[None].to(self._device)


def question_of(phrase: str) -> str:
    """A phrase as the benchmark asks for it: small letters, without marks, and a question mark."""
    return re.sub(r"([.!\"()*#:;~])", "", f"{phrase}?".lower()).rstrip(" ")
