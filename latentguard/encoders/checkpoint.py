"""Weights of Latent-CLIP on disk: the official checkpoint, read without running anything in it,
and the converted safetensors file that stands in for it afterward.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from latentguard.atomic import replacing_by_name
from latentguard.encoders.catalog import CATALOG, LatentClipConfig
from latentguard.encoders.header import opened, read_header
from latentguard.errors import ModelError
from latentguard.regular import read_whole, sha256_of
from latentguard.text import first_line

FORMAT = "latentguard-latent-clip"
SCHEMA_VERSION = "1"

# What an official checkpoint holds besides the two towers: the frozen SDXL VAE encoder, which made
# the latents in training. Nothing else may be left over.
SKIPPED = ("visual.vae_encoder.", "visual.vae_quant_conv.")
IMAGE_PREFIX = "visual.latent_vit."


@dataclass(frozen=True)
class Weights:
    """Both towers: keys `image.*`, `text.*` and `logit_scale`, and where they come from."""

    tensors: dict[str, Tensor]
    config: LatentClipConfig
    name: str
    sha256: str
    source_sha256: str


def expected_shapes(config: LatentClipConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a converted file with its shape."""
    d, p = config.width, config.patch
    shapes: dict[str, tuple[int, ...]] = {
        "image.conv1.weight": (d, config.channels, p, p),
        "image.class_embedding": (d,),
        "image.positional_embedding": (1 + config.side**2, d),
        **_norm("image.ln_pre", d),
        **_blocks("image.transformer", d, config.layers),
        **_norm("image.ln_post", d),
        "image.proj": (d, config.embed_dim),
        "logit_scale": (),
    }
    t = config.text_width
    return shapes | {
        "text.token_embedding.weight": (config.vocab_size, t),
        "text.positional_embedding": (config.context_length, t),
        **_blocks("text.transformer", t, config.text_layers),
        **_norm("text.ln_final", t),
        "text.text_projection": (t, config.embed_dim),
    }


def _norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _blocks(prefix: str, d: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(layers):
        block = f"{prefix}.resblocks.{index}"
        shapes |= _norm(f"{block}.ln_1", d) | _norm(f"{block}.ln_2", d)
        for name, size in (
            ("attn.in_proj", (3 * d, d)),
            ("attn.out_proj", (d, d)),
            ("mlp.c_fc", (4 * d, d)),
            ("mlp.c_proj", (d, 4 * d)),
        ):
            joint = "_" if name.endswith("in_proj") else "."
            shapes[f"{block}.{name}{joint}weight"] = size
            shapes[f"{block}.{name}{joint}bias"] = size[:1]
    return shapes


# --- the official file -----------------------------------------------------------------------


def read_official(
    path: Path, config: LatentClipConfig | None = None, sha256: str | None = None
) -> Weights:
    """Both towers of an official checkpoint, in its dtype; no digest of the weights yet.

    The unpickler may build tensors, plain containers and numpy scalars, nothing else. The model is
    told by the shapes of the patch embedding and the projection; `config` overrides its sizes.
    The file is opened once: `source_sha256` is of the bytes that the weights are copied from, and
    no later change of the file is one of the weights.
    Raises ModelError for anything that is not exactly such a checkpoint, or has another SHA-256
    than `sha256`.
    """
    with opened(path) as file:
        digest = sha256_of(file)
        if sha256 is not None and digest != sha256:
            raise ModelError(f"{path}: has SHA-256 {digest}, not the expected {sha256}")
        tensors = _rename(path, _state_dict(path, file))
        name, found = _identify(path, tensors)
        config = config or found
        _check(path, tensors, config)
        size = os.fstat(file.fileno()).st_size
        if sum(value.numel() * value.element_size() for value in tensors.values()) > size:
            raise ModelError(
                f"{path}: states tensors that are larger than the file, which repeat their numbers"
            )
        tensors = {key: value.clone() for key, value in tensors.items()}
    return Weights(tensors, config, name, "", digest)


def _state_dict(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of an open checkpoint, mapped: what is not looked at takes no memory."""
    # A path is what torch maps; this one leads to the open file, whatever `path` leads to by now.
    name = f"/dev/fd/{file.fileno()}"
    try:
        with torch.serialization.safe_globals(_scalar_globals()):
            loaded = torch.load(
                name if os.path.exists(name) else path,
                map_location="cpu",
                weights_only=True,
                mmap=True,
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, it holds more than tensors and plain data, and running what it "
            f"asks for is not safe: {first_line(error)}"
        ) from error
    except Exception as error:  # what a damaged file raises is up to zip, pickle and torch
        raise ModelError(
            f"{path}: not a PyTorch checkpoint that can be mapped (truncated, or written before "
            f"PyTorch 1.6): {first_line(error)}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ModelError(f"{path}: must be a dict with a `state_dict`, got {type(loaded).__name__}")
    not_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise ModelError(f"{path}: values must be tensors, not so {_some(not_tensors)}")
    return state


def _scalar_globals() -> list[Any]:
    """What numpy scalars in a checkpoint need, under numpy's old name and its new one."""
    try:
        from numpy._core.multiarray import scalar
    except ImportError:
        from numpy.core.multiarray import scalar  # type: ignore[no-redef, unused-ignore]
    kinds = ("float64", "float32", "float16", "int64", "int32", "bool")
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _rename(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official keys to ours; `module.` is what DistributedDataParallel puts before every key."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = key.removeprefix("module.")
        if bare.startswith(SKIPPED):
            continue
        if bare.startswith(IMAGE_PREFIX):
            ours = "image." + bare.removeprefix(IMAGE_PREFIX)
        elif bare == "logit_scale":
            ours = bare
        else:
            ours = "text." + bare
        if ours in tensors:
            raise ModelError(f"{path}: holds {bare} twice, with and without `module.`")
        tensors[ours] = value
    return tensors


def _identify(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, LatentClipConfig]:
    conv, proj = tensors.get("image.conv1.weight"), tensors.get("image.proj")
    if conv is None or proj is None or conv.dim() != 4 or proj.dim() != 2:
        raise ModelError(
            f"{path}: not a Latent-CLIP checkpoint: `{IMAGE_PREFIX}conv1.weight` [D, C, p, p] and "
            f"`{IMAGE_PREFIX}proj` [D, dim] must be there, got {_some(tensors)}"
        )
    known = [entry for entry in CATALOG.values() if entry.config is not None]
    alike = [
        (entry.name, entry.config)
        for entry in known
        if entry.config is not None
        and (conv.shape[-1], proj.shape[1]) == (entry.config.patch, entry.config.embed_dim)
    ]
    # Sizes of different latent spaces may have these two in common.
    alike.sort(key=lambda model: tuple(conv.shape[:2]) != (model[1].width, model[1].channels))
    if alike:
        return alike[0]
    raise ModelError(
        f"{path}: patch {conv.shape[-1]} and dimension {proj.shape[1]} belong to none of "
        f"{', '.join(entry.name for entry in known)}"
    )


def _check_layers(path: Path, config: LatentClipConfig, tensors: int) -> None:
    """Refuse more layers than a file of so many tensors can have, before they are listed."""
    if config.layers + config.text_layers > tensors:
        raise ModelError(
            f"{path}: cannot be read: {config.layers} and {config.text_layers} layers in "
            f"{tensors} tensors"
        )


def _check(path: Path, tensors: Mapping[str, Tensor], config: LatentClipConfig) -> None:
    want = expected_shapes(config)
    missing = [key for key in want if key not in tensors]
    unexpected = [key for key in tensors if key not in want]
    if missing or unexpected:
        parts = [
            f"{what} {_some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ModelError(f"{path}: the weights do not fit the model: {'; '.join(parts)}")
    for key, shape in want.items():
        got = tensors[key]
        if tuple(got.shape) != shape or not got.dtype.is_floating_point:
            raise ModelError(
                f"{path}: `{key}` must be a floating-point tensor of shape {list(shape)}, "
                f"got {got.dtype} {list(got.shape)}"
            )


# --- the converted file ----------------------------------------------------------------------


def convert(weights: Weights, dtype: torch.dtype = torch.float32) -> Weights:
    """The weights in one dtype, with their digest; `logit_scale` is float32 whatever `dtype` is.

    Raises ModelError for NaN or infinite weights.
    """
    tensors = {
        key: value.to(torch.float32 if key == "logit_scale" else dtype).contiguous()
        for key, value in weights.tensors.items()
    }
    broken = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModelError(
            f"{weights.name}: the checkpoint has NaN or infinite weights in {_some(broken)} "
            f"(as {dtype})"
        )
    return replace(weights, tensors=tensors, sha256=weights_sha256(tensors))


def write(target: Path, weights: Weights) -> None:
    """Write a converted file; readers see the old one or all of the new one."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "name": weights.name,
        "sha256": weights.sha256,
        "source_sha256": weights.source_sha256,
        "config": json.dumps(weights.config.to_dict(), sort_keys=True),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(target) as partial:
        save_file(weights.tensors, partial, metadata=metadata)


def read_converted(path: Path) -> Weights:
    """A converted file, keys and shapes checked, and its digest computed again and compared."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    with opened(path) as file:
        header = read_header(path, file)
        metadata = header.metadata
        if metadata.get("format") != FORMAT or metadata.get("schema_version") != SCHEMA_VERSION:
            raise ModelError(
                f"{path}: must be of format {FORMAT!r} and schema_version {SCHEMA_VERSION!r}, got "
                f"{metadata.get('format')!r} and {metadata.get('schema_version')!r}"
            )
        try:
            config = LatentClipConfig.from_dict(json.loads(metadata["config"]))
            _check_layers(path, config, len(header.shapes))
            # A copy, and not a map of the file: what is digested below is what will run.
            tensors = load(read_whole(file))
        except (KeyError, ValueError, RecursionError, SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
    _check(path, tensors, config)
    digest = weights_sha256(tensors)
    if digest != metadata.get("sha256"):
        raise ModelError(
            f"{path}: its weights are not those that were written (sha256 {digest}, metadata says "
            f"{metadata.get('sha256')}): delete it and convert the checkpoint again"
        )
    source = metadata.get("source_sha256", "")
    return Weights(tensors, config, metadata.get("name", path.stem), digest, source)


# --- digests ---------------------------------------------------------------------------------


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest over names, dtypes, shapes and values; the order in a file does not matter."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{value.dtype}|{list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with opened(path) as file:
        return sha256_of(file)


def _some(keys: Iterable[str]) -> str:
    """The first keys of a list, and how many there are."""
    keys = sorted(keys)
    shown = ", ".join(keys[:4])
    return shown if len(keys) <= 4 else f"{shown} and {len(keys) - 4} more ({len(keys)} in all)"
