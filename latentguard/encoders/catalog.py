"""The models that have a name: what they read, how large they are, where they come from, where
they lie on this machine. No torch: `latentguard models list` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentguard import plugins
from latentguard.atomic import replacing
from latentguard.errors import ModelError

if TYPE_CHECKING:
    from latentguard.spaces import LatentSpace

HUB = "https://huggingface.co"
MERGE = "+merge="
"""Behind a model's name or file: the share of its tokens that merge, as in `NAME+merge=0.5`."""

VIEWS = "+views="
"""Behind a model's name or file: `crops` reads an image whole and in crops, see `crops`."""
ANY_VIEW = "view"
"""The kind of a nano network that reads the linear RGB view of any space, as its file says."""

MAX_CONTEXT = 1024
"""Tokens of a prompt that a text tower may read; the causal mask grows with their square."""

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LatentClipConfig:
    """The shape of a Latent-CLIP: an image tower over latents, CLIP's text tower beside it.

    `grid` is the trained side in latent cells (64 is 512 pixels), heads are 64 wide in both
    towers, the MLP is four times as wide as the tower. Sizes: Becker, Wendler et al.,
    arXiv 2503.08455, and the configuration files that come with its checkpoints.
    """

    patch: int
    embed_dim: int
    text_width: int
    grid: int = 64
    channels: int = 4
    width: int = 768
    layers: int = 12
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    space: str = "sdxl"
    needs_scaled: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or not 0 < value <= 65536):
                raise ModelError(
                    f"model configuration: `{field.name}` must be a whole number from 1 to 65536, "
                    f"got {value!r}"
                )
        if self.context_length > MAX_CONTEXT:
            raise ModelError(
                f"model configuration: `context_length` must be at most {MAX_CONTEXT}, "
                f"got {self.context_length}"
            )
        if type(self.needs_scaled) is not bool:
            raise ModelError(
                "model configuration: `needs_scaled` must be true or false, "
                f"got {self.needs_scaled!r}"
            )
        if not isinstance(self.space, str):
            raise ModelError(
                f"model configuration: `space` must be a space's name, got {self.space!r}"
            )
        if self.grid % self.patch:
            raise ModelError(
                f"model configuration: `grid` must be a multiple of `patch` ({self.patch}), "
                f"got {self.grid}"
            )
        for name in ("width", "text_width"):
            if getattr(self, name) % 64:
                raise ModelError(
                    f"model configuration: `{name}` must be a multiple of 64 (the width of a "
                    f"head), got {getattr(self, name)}"
                )

    @property
    def side(self) -> int:
        """Patches along one side of the trained grid."""
        return self.grid // self.patch

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentClipConfig:
        """The other way; ModelError for a key that is missing or unknown."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != known:
            got = sorted(values) if isinstance(values, dict) else values
            raise ModelError(f"model configuration: keys must be {sorted(known)}, got {got}")
        return cls(**values)


@dataclass(frozen=True)
class Entry:
    """A named model, as `models/NAME.json` describes it.

    format: how its weights are written, a key of `FORMATS`.
    space: the latent space that it reads; None: every space that has a linear RGB view (`reads`).
    rank: the best of a space first; `--model auto` goes by this order.
    size: bytes to fetch, as far as it is known beforehand; 0 for a bundled model.
    repo, file: where the official checkpoint is on the hub; None for a bundled model.
    weights, module: of a model that another package brings: its file, and the module whose
        `load(path, device, entry)` makes an encoder of it, where `format` is none of latentguard's.
    config: the shape of a Latent-CLIP; None for other models.
    same_as: the bundled model whose weights these are, under another name; None: its own.
    """

    name: str
    format: str
    space: str | None
    summary: str
    rank: int
    size: int = 0
    repo: str | None = None
    file: str | None = None
    config: LatentClipConfig | None = None
    weights: Path | None = None
    module: str | None = None
    same_as: str | None = None

    def reads(self, space: str) -> bool:
        """Whether it reads latents of a space of that name."""
        if self.space is not None:
            return self.space == space
        from latentguard.errors import LatentsError
        from latentguard.spaces import LatentSpace

        try:
            return readable_view(LatentSpace.get(space))
        except LatentsError:
            return False

    @property
    def bundled(self) -> bool:
        """Whether the weights come inside the package."""
        return self.repo is None

    @property
    def url(self) -> str:
        """Where a browser fetches the official file."""
        return f"{HUB}/{self.repo}/resolve/main/{self.file}"

    @classmethod
    def read(cls, path: Path, weights: Path | None = None, module: str | None = None) -> Entry:
        """From a JSON file, whose name is the model's; ModelError for what it cannot mean.

        weights, module: as above, for the entry point of a package.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = values.pop("config", None)
            if config is not None:
                config = LatentClipConfig(**config, space=values["space"])
            entry = cls(name=path.stem, config=config, weights=weights, module=module, **values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: not a model's description ({error})") from error
        if entry.format not in FORMATS and module is None:
            raise ModelError(
                f"{path}: `format` must be {' or '.join(FORMATS)}, got {entry.format!r}"
            )
        return entry


COARSEST = 16
"""Pixels a cell, at most, of spaces whose view shows enough to be read: a picture of 1024 px has 64
cells a side there."""


def readable_view(space: LatentSpace) -> bool:
    """Whether a space has a linear RGB view that is fine enough to be read."""
    return space.rgb_view is not None and space.vae_scale_factor <= COARSEST


# How weights are written -> the module whose `load(path, device, entry)` makes an encoder of
# them, or `load(path, device, entry, space)` where it is a model of several spaces.
FORMATS = {
    "latentguard-latent-clip": "latentguard.encoders.latent_clip",
    "latentguard-nano": "latentguard.encoders.nano",
}


def _read_all() -> dict[str, Entry]:
    entries = [Entry.read(path) for path in (Path(__file__).parent / "models").glob("*.json")]
    return {entry.name: entry for entry in sorted(entries, key=lambda e: (e.rank, e.name))}


CATALOG: dict[str, Entry] = _read_all()
"""The models that ship."""


def known(name: str) -> Entry | None:
    """The entry of a name, of a model that ships or that an installed package brings.

    Raises ModelError where the package's entry point cannot be loaded.
    """
    if name in CATALOG:
        return CATALOG[name]
    if name not in plugins.names(plugins.ENCODERS):
        return None
    entry = plugins.load(plugins.ENCODERS, name, Entry, ModelError)
    if entry.name != name or entry.weights is None:
        raise ModelError(
            f"the entry point {name!r} of {plugins.ENCODERS} must be an Entry of that name with "
            f"its weights, got {entry.name!r} with {entry.weights}"
        )
    return entry


def entries() -> list[Entry]:
    """Every model that has a name, the best of a space first; packages' that cannot be loaded are
    left out, and are errors where they are asked for."""
    found = list(CATALOG.values())
    for name in plugins.names(plugins.ENCODERS):
        try:
            entry = None if name in CATALOG else known(name)
        except ModelError:
            continue
        found += [] if entry is None else [entry]
    return sorted(found, key=lambda entry: (entry.rank, entry.name))


def cache_dir() -> Path:
    """Where converted weights are kept: LATENTGUARD_CACHE, else the platform's cache folder."""
    chosen = os.environ.get("LATENTGUARD_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "latentguard" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "latentguard"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "latentguard"


def converted_path(name: str) -> Path:
    """Where the converted weights of a named model lie, or would."""
    return cache_dir() / "models" / f"{name}.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a model was first fetched from: trusted then, and compared with from then on.

    revision: the commit of the repository. sha256: of the official file.
    """

    repo: str
    file: str
    revision: str
    sha256: str


def source_path(name: str) -> Path:
    """Where the record of a model's first download lies, or would."""
    return cache_dir() / "models" / f"{name}.source.json"


def read_source(name: str) -> Source | None:
    """The record, None where the model was never fetched. Raises ModelError for a damaged one."""
    path, entry = source_path(name), CATALOG[name]
    if not path.exists():
        return None
    try:
        found = Source(**json.loads(path.read_text("utf-8")))
        sound = (found.repo, found.file) == (entry.repo, entry.file)
        sound = sound and SHA256.fullmatch(found.sha256) is not None
        if not sound or re.fullmatch(r"[0-9a-f]{40}", found.revision) is None:
            raise ValueError("values that do not fit")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: is no record of where {name} was fetched from ({error}): delete it"
        ) from error
    return found


def write_source(name: str, source: Source) -> None:
    """Keep the record of a download."""
    with replacing(source_path(name)) as file:
        file.write(json.dumps(asdict(source), indent=1).encode())


def by_hand_path(name: str) -> Path:
    """Where an official checkpoint file that was fetched by hand is looked for."""
    return cache_dir() / "models" / f"{name}.pt"


def bundled_path(name: str) -> Path:
    """Where a bundled model's weights lie inside the package."""
    entry = CATALOG.get(name)
    stem = name if entry is None or entry.same_as is None else entry.same_as
    return Path(__file__).parent / "weights" / f"{stem}.safetensors"


def _hub_cache_path(entry: Entry) -> Path | None:
    """The official file in huggingface_hub's own cache; asks no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(str(entry.repo), str(entry.file))
    return Path(found) if isinstance(found, str) else None


def locate(name: str) -> Path | None:
    """The file that a named model would be loaded from on this machine, None if there is none.

    Converted weights first, then an official checkpoint put there by hand, then one in
    huggingface_hub's cache.
    """
    entry = known(name)
    if entry is None:
        return None
    if entry.bundled:
        path = entry.weights or bundled_path(name)
        return path if path.is_file() else None
    for path in (converted_path(name), by_hand_path(name)):
        if path.is_file():
            return path
    return _hub_cache_path(entry)


def how_to_get(name: str) -> str:
    """What to do about a named model that is not on this machine, in one clause."""
    size = CATALOG[name].size / 1e9
    return f"fetch it with `latentguard models get {name}` ({size:.1f} GB), or {by_hand(name)}"


def by_hand(name: str) -> str:
    """How to do without the network, in one clause."""
    entry = CATALOG[name]
    space = str(entry.space)
    bundled = next(e.name for e in CATALOG.values() if e.bundled and e.reads(space))
    return (
        f"download {entry.url} on another machine and put it at {by_hand_path(name)}, or use the "
        f"bundled {bundled}"
    )
