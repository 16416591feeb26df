"""Names and paths to encoders, and what is installed under a name.

Only `fetch` asks the network, and only `latentguard models get` calls it.
"""

from __future__ import annotations

import difflib
import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard import plugins
from latentguard.encoders.base import Encoder, traits
from latentguard.encoders.catalog import (
    ANY_VIEW,
    CATALOG,
    FORMATS,
    HUB,
    MERGE,
    SHA256,
    VIEWS,
    Entry,
    Source,
    by_hand,
    cache_dir,
    converted_path,
    entries,
    how_to_get,
    known,
    locate,
    read_source,
    source_path,
    write_source,
)
from latentguard.encoders.header import read_metadata
from latentguard.errors import ModelError
from latentguard.spaces import RECORDS, SPACES, LatentSpace
from latentguard.text import first_line

if TYPE_CHECKING:
    import torch


def load_encoder(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    space: str | LatentSpace | None = None,
) -> Encoder:
    """An encoder by name (`latentguard models list`) or from a file.

    A path is an official Latent-CLIP checkpoint (.pt, .pth, .ckpt) or a .safetensors file that
    latentguard wrote, whose metadata says what it is. After a name or a path, `+merge=SHARE` makes
    a Latent-CLIP merge that share of its tokens (see `LatentCLIP.merge`), and `+views=crops` makes
    a nano model also read crops (see `crops.Crops`). `device` None is CUDA if there is one, else
    the CPU. `space` is the latent space that it is to read, which a model of several spaces needs
    (`needs_space`).

    Raises ModelError for an unknown name, for a model that is not on this machine (it says how to
    get it) or that reads another space, and for a file that cannot be loaded.
    """
    device = _device(device)
    plain, found, views = str(name_or_path).rpartition(VIEWS)
    if found:
        return _in_views(load_encoder(plain, device, space), views)
    plain, found, share = str(name_or_path).rpartition(MERGE)
    if found:
        return _merging(load_encoder(plain, device, space), share)
    entry = known(name_or_path) if isinstance(name_or_path, str) else None
    if entry is not None:
        encoder = _load_named(entry, device, space)
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ModelError(_unknown(str(name_or_path)))
        encoder = _load_file(path, device, space)
    if space is not None and encoder.space != LatentSpace.get(space).name:
        raise ModelError(f"model {encoder.name} reads {encoder.space} latents, not {space}")
    return encoder


def needs_space(model: str | Path) -> bool:
    """Whether the latent space must be known before a model can be loaded.

    This holds for `auto`, and for a model that reads the RGB view of several spaces.
    """
    plain = str(model).split(VIEWS)[0].split(MERGE)[0]
    entry = known(plain) if isinstance(model, str) else None
    if entry is not None:
        return entry.space is None
    path = Path(plain).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return model == "auto"
    return read_metadata(path).get("kind") == ANY_VIEW


def _in_views(encoder: Encoder, views: str) -> Encoder:
    from latentguard.encoders.crops import Crops

    if views == "whole":
        return encoder
    if views != "crops":
        raise ModelError(f"{encoder.name}{VIEWS}{views}: views are `whole` or `crops`")
    return Crops(encoder)


def _merging(encoder: Encoder, share: str) -> Encoder:
    kind = traits(encoder)
    if not kind.merges:
        raise ModelError(f"{encoder.name} has no tokens to merge: only the Latent-CLIP models have")
    try:
        kind.merge = float(share)
    except ValueError as error:
        raise ModelError(
            f"{encoder.name}{MERGE}{share}: the share of tokens that merge must be a number"
        ) from error
    return encoder


def best_encoder(space: str) -> str:
    """The name that `--model auto` stands for: the best encoder of a space on this machine.

    Raises ModelError if there is none; it says which spaces have one, or how to get it.
    """
    everything = entries()
    of_space = [entry for entry in everything if entry.reads(space)]
    for entry in of_space:
        if locate(entry.name) is not None:
            return entry.name
    if of_space:
        raise ModelError(_missing(of_space[0]))
    spaces = [name for name in SPACES if any(entry.reads(name) for entry in everything)]
    record = RECORDS.get(space)
    why = f" ({record.view_missing})" if record is not None and record.view_missing else ""
    raise ModelError(
        f"no encoder reads latents of space {space}{why}: there are encoders of "
        f"{', '.join(spaces)}; `latentguard adapt` makes one of your own, which --model or model= "
        "takes"
    )


def find(name: str) -> Entry:
    """The catalog's entry of a name; ModelError lists the names and the closest."""
    entry = known(name)
    if entry is None:
        raise ModelError(_unknown(name))
    return entry


def _load_named(
    entry: Entry, device: str | torch.device, space: str | LatentSpace | None
) -> Encoder:
    path = locate(entry.name)
    if path is None:
        raise ModelError(_missing(entry))
    if not entry.bundled and path != converted_path(entry.name):
        path = install(entry.name, path)
    return _load_as(entry.format, path, device, entry, space)


def _missing(entry: Entry) -> str:
    if entry.bundled:
        return (
            f"the bundled model {entry.name} is missing from this installation: reinstall "
            "latentguard"
        )
    return f"{entry.name} is not on this machine: {how_to_get(entry.name)}"


def install(name: str, checkpoint_file: Path) -> Path:
    """Convert an official checkpoint file and keep it in the cache as a named model.

    Returns the converted file. Raises ModelError for a bundled model, for a file that cannot be
    loaded, and for another model's checkpoint.
    """
    return _install(name, checkpoint_file)[0]


def _install(name: str, checkpoint_file: Path, sha256: str | None = None) -> tuple[Path, str]:
    """The converted file, and the SHA-256 of the checkpoint that it was made of.

    sha256: what that must be, where it is known.
    """
    from latentguard.encoders import checkpoint

    entry = find(name)
    if entry.bundled:
        raise ModelError(f"{name} is bundled: there is nothing to install")
    weights = checkpoint.read_official(checkpoint_file, sha256=sha256)
    if weights.name != name:
        raise ModelError(f"{checkpoint_file}: is a checkpoint of {weights.name}, not of {name}")
    target = converted_path(name)
    checkpoint.write(target, checkpoint.convert(weights))
    return target, weights.source_sha256


def fetch(name: str, keep: bool = False) -> Path:
    """Download a model's official checkpoint (progress on stderr) and install it.

    What is downloaded must have the SHA-256 that the hub publishes for it, and the one that was
    recorded when it was first fetched on this machine (`catalog.Source`), whose revision is asked
    for from then on. An interrupted download is continued by the next call. The download is deleted
    once it is converted, unless `keep`. Returns the converted file; raises ModelError with what to
    do by hand where the hub cannot be reached, and where the digest is another.
    """
    entry = find(name)
    if entry.bundled:
        raise ModelError(f"{name} is bundled: there is nothing to fetch")
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError as error:
        raise ModelError(
            f"{name}: fetching needs huggingface_hub: pip install 'latentguard[torch]', or "
            f"{by_hand(name)}"
        ) from error
    folder = cache_dir() / "downloads" / name
    repo, file, known = str(entry.repo), str(entry.file), read_source(name)
    try:
        asked = known.revision if known is not None else None
        published = get_hf_file_metadata(hf_hub_url(repo, file, revision=asked))
        # Of one commit, whatever the branch becomes while gigabytes are on their way.
        revision = asked or published.commit_hash
        downloaded = hf_hub_download(repo, file, revision=revision, local_dir=folder)
    except Exception as error:  # its HTTP library and with it the errors differ between versions
        reason = first_line(error).split(". ")[0]
        raise ModelError(
            f"{name} could not be fetched from {HUB}/{entry.repo} ({reason}): {by_hand(name)}"
        ) from error
    digest = published.etag if published.etag and SHA256.fullmatch(published.etag) else None
    if known is not None:
        if digest not in (None, known.sha256):
            raise ModelError(
                f"{name}: the hub publishes SHA-256 {digest}, and {source_path(name)} records "
                f"{known.sha256} from when it was first fetched: delete that record if you know why"
            )
        digest = known.sha256
    try:
        target, found = _install(name, Path(downloaded), digest)
    except ModelError:
        # It would be taken for complete by the next call.
        shutil.rmtree(folder)
        raise
    if revision is not None:
        write_source(name, Source(repo, file, revision, found))
    if not keep:
        shutil.rmtree(folder)
    return target


def _load_file(path: Path, device: str | torch.device, space: str | LatentSpace | None) -> Encoder:
    if path.suffix in (".pt", ".pth", ".ckpt"):  # official checkpoints are of Latent-CLIPs
        return _load_as("latentguard-latent-clip", path, device)
    written_as = read_metadata(path).get("format")
    if written_as not in FORMATS:
        raise ModelError(
            f"{path}: metadata `format` must be {' or '.join(FORMATS)}, got {written_as!r}"
        )
    return _load_as(written_as, path, device, None, space)


def _load_as(
    written_as: str,
    path: Path,
    device: str | torch.device,
    entry: Entry | None = None,
    space: str | LatentSpace | None = None,
) -> Encoder:
    module = (entry.module if entry is not None else None) or FORMATS[written_as]
    load = importlib.import_module(module).load
    if entry is None:
        several = path.suffix == ".safetensors" and read_metadata(path).get("kind") == ANY_VIEW
    else:
        several = entry.space is None
    encoder: Encoder = load(path, device, entry, space) if several else load(path, device, entry)
    return encoder


def _device(device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _unknown(name: str) -> str:
    names = [*CATALOG, *plugins.names(plugins.ENCODERS)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"no model or file is called {name!r}{guess}: choose from {', '.join(names)}, or a path"
