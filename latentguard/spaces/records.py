"""What is said of a latent space in one file: read, checked, and given as plain numbers.

`data/NAME.json` holds the spaces that ship, each of which is known by being there. A space of one's
own is a file of the same kind, JSON or YAML (docs/spaces.md has every key).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentguard.errors import LatentsError, PolicyError
from latentguard.spaces.rgb import RGBView
from latentguard.text import visible

Keys = tuple[str | int, ...]
"""The way to a value: the keys of mappings and the indices of lists."""

DATA = Path(__file__).parent / "data"
SUFFIXES = (".json", ".yaml", ".yml")
SCHEMA_VERSION = 1

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
ORDERS = ("c dy dx", "c dx dy", "dy dx c", "dx dy c", "dy c dx", "dx c dy")
MAX_CHANNELS = 4096
MAX_FACTOR = 256
STATISTICS = ("batch_norm", "mean_std")
"""Where the numbers of a scaling are statistics of the VAE: the buffers that hold them."""


@dataclass(frozen=True)
class Vae:
    """How the VAE of a pipeline is told.

    name: for messages. classes: those of diffusers. by_class_only: its configuration has no number
    that another's could not have. scaling_factor: what the configuration says where the space's
    `scale` is another number, as where a pipeline multiplies by one of its own.
    """

    name: str
    classes: tuple[str, ...] = ()
    by_class_only: bool = False
    scaling_factor: float | None = None


@dataclass(frozen=True)
class SpaceRecord:
    """One file.

    Attributes:
        name, summary, source: for people; `source` says where the numbers come from.
        rank: the place in lists.
        of: the space of which this is another scaling or order of tokens, or None.
        aliases: other names that an operator may give.
        fields: what a LatentSpace is made of.
        normalized: whether the configuration of the VAE gives latents_mean and latents_std.
        usual_scale: by which those are multiplied: scaled = (raw - mean) * usual_scale / std.
        vae: how a VAE of it is told, or None.
        pipelines: what the names of its pipelines' classes begin with; the longest counts.
        used_by: models, for people.
        view_missing: why no bundled model reads it, one clause, or "".
    """

    name: str
    summary: str
    source: str
    rank: int
    of: str | None
    fields: Mapping[str, Any]
    normalized: bool
    usual_scale: float = 1.0
    aliases: tuple[str, ...] = ()
    vae: Vae | None = None
    pipelines: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()
    statistics_source: str = ""
    view_missing: str = ""


def read_record(path: Path) -> SpaceRecord:
    """The record in a file, whose name is the space's unless it gives a `name`.

    Raises LatentsError, one sentence with the file, the line and the key.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise LatentsError(f"{path}: a latent space is a file that ends in {', '.join(SUFFIXES)}")
    if path.parent == DATA:  # ours, read at every import: without PyYAML
        return record_of(json.loads(path.read_bytes()), str(path), path.stem)
    from latentguard.yaml_nodes import compose, line_of, read_bytes

    try:
        data = read_bytes(path)
        # JSON is YAML but for its tabs, which are blanks there: no string can hold one.
        json_text = path.suffix.lower() == ".json"
        root = compose(data.replace(b"\t", b" ") if json_text else data, str(path))
    except PolicyError as error:
        raise LatentsError(str(error)) from error
    try:
        return _record(root.plain(), path.stem)
    except _WrongError as wrong:
        raise LatentsError(f"{path}:{line_of(root, wrong.keys)}: {wrong}") from wrong


def record_of(values: Any, source: str, name: str = "") -> SpaceRecord:
    """The record that is in a mapping, under `name` unless it gives its own.

    Raises LatentsError, which names `source` and the key.
    """
    try:
        return _record(values, name)
    except _WrongError as wrong:
        raise LatentsError(f"{source}: {wrong}") from wrong


def shipped_records() -> list[SpaceRecord]:
    """Those of the package, in their order. Raises LatentsError for a file that is wrong."""
    records = [read_record(path) for path in DATA.glob("*.json")]
    return sorted(records, key=lambda record: (record.rank, record.name))


# -- checking --------------------------------------------------------------------------------


class _WrongError(Exception):
    """What is wrong with the value at `keys`."""

    def __init__(self, keys: Keys, sentence: str) -> None:
        super().__init__(sentence)
        self.keys = keys


class _ItemError(ValueError):
    """An item of a list is not what it must be."""

    def __init__(self, index: int, value: Any, reason: Exception) -> None:
        super().__init__(value)
        self.index, self.value, self.reason = index, value, reason


@dataclass
class _Mapping:
    """A mapping whose keys are taken one by one; what is left over is an error."""

    values: Any
    keys: Keys = ()
    _known: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            where = f"`{self._path()}`" if self.keys else "a latent space"
            raise _WrongError(self.keys, f"{where} must be a mapping, got {_shown(self.values)}")

    def take(self, key: str, kind: Callable[[Any], Any], wanted: str, default: Any = ...) -> Any:
        """The value of a key as `kind` makes it; ValueError or TypeError of `kind` is a refusal."""
        self._known.append(key)
        value = self.values.get(key)
        if value is None:
            if default is ...:
                strange = [given for given in map(str, self.values) if given not in self._known]
                near = difflib.get_close_matches(key, strange, n=1)
                hint = f" (`{visible(near[0], 40)}` is no key: was it meant?)" if near else ""
                raise _WrongError(
                    self.keys, f"`{self._path(key)}` is missing{hint}: it must be {wanted}"
                )
            return default
        try:
            return kind(value)
        except (ValueError, TypeError) as error:
            at: Keys = ()
            reason: Exception = error
            while isinstance(reason, _ItemError):
                at, value, reason = (*at, reason.index), reason.value, reason.reason
            place = "".join(f"[{index}]" for index in at)
            where = f" at `{self._path(key)}{place}`" if at else ""
            raise _WrongError(
                (*self.keys, key, *at),
                f"`{self._path(key)}` must be {wanted}, got {_shown(value)}{where}",
            ) from error

    def mapping(self, key: str) -> _Mapping | None:
        self._known.append(key)
        value = self.values.get(key)
        return None if value is None else _Mapping(value, (*self.keys, key))

    def close(self) -> None:
        for key in self.values:
            if key not in self._known:
                raise _WrongError(
                    (*self.keys, key),
                    f"`{self._path(visible(key, 40))}` is no key of a latent space: there are "
                    f"{', '.join(self._known)}",
                )

    def _path(self, *more: str) -> str:
        return ".".join(str(key) for key in (*self.keys, *more))


def _record(values: Any, stem: str) -> SpaceRecord:
    top = _Mapping(values)
    top.take("schema_version", _exactly(SCHEMA_VERSION), str(SCHEMA_VERSION))
    name = top.take("name", name_of, "a name of small letters, digits, '.', '-' and '_'", stem)
    if not NAME.fullmatch(name):
        raise _WrongError((), f"the file's name {_shown(name)} is none for a space: give `name`")
    of = top.take("of", name_of, "the name of a space", None)
    channels = top.take("channels", _whole(1, MAX_CHANNELS), f"a number from 1 to {MAX_CHANNELS}")
    sides = f"a number of pixels from 1 to {MAX_FACTOR}"
    fields: dict[str, Any] = {
        "channels": channels,
        "vae_scale_factor": top.take("factor", _whole(1, MAX_FACTOR), sides),
        "temporal_factor": top.take(
            "temporal_factor", _whole(1, MAX_FACTOR), "a number of frames", 1
        ),
    }
    _packing(top.mapping("packing"), fields)
    normalized, usual_scale = _scaling(top.mapping("scaling"), channels, fields)
    statistics_source = _statistics(top.mapping("statistics"), channels, fields)
    fields["rgb_view"] = _view(top.mapping("rgb_view"), channels)
    record = SpaceRecord(
        name=name,
        summary=top.take("summary", _text, "text", ""),
        source=top.take("source", _text, "text", ""),
        rank=top.take("rank", _whole(0, 10**6), "a whole number", 0),
        of=of,
        fields=fields,
        normalized=normalized,
        usual_scale=usual_scale,
        aliases=top.take("aliases", _names, "a list of names", ()),
        vae=_vae(top.mapping("vae")),
        pipelines=top.take("pipelines", _texts, "a list of beginnings of class names", ()),
        used_by=top.take("used_by", _texts, "a list of models", ()),
        statistics_source=statistics_source,
        view_missing=top.take("view_missing", _text, "text", ""),
    )
    top.close()
    return record


def _scaling(scaling: _Mapping | None, channels: int, fields: dict[str, Any]) -> tuple[bool, float]:
    """`scale` and `shift`; whether they are made of a mean and a deviation of each channel, and
    with which factor."""
    if scaling is None:
        raise _WrongError(
            (),
            "`scaling` is missing: it must give scale and shift, mean and std, or from_vae, for "
            "scaled = (raw - shift) * scale",
        )
    packed = channels * fields.get("packed_patch", 1) ** 2
    numbers = _numbers(channels, packed)
    wanted = f"a finite number or a list of {channels}"
    wanted += f" or {packed}" if packed > channels else ""
    from_vae = scaling.take("from_vae", _one_of(STATISTICS), " or ".join(STATISTICS), None)
    scale = scaling.take("scale", numbers, wanted, None)
    shift = scaling.take("shift", numbers, wanted, None)
    mean = scaling.take("mean", numbers, wanted, None)
    std = scaling.take("std", numbers, wanted, None)
    scaling.close()
    fields["statistics_of_vae"] = from_vae
    if from_vae is not None:
        if any(value is not None for value in (scale, shift, mean, std)):
            raise _WrongError(
                scaling.keys, "`scaling.from_vae` stands alone: the VAE has the numbers"
            )
        fields |= {"scale": None, "shift": None}
        return False, 1.0
    if mean is None and std is None:
        if scale is None:
            raise _WrongError(scaling.keys, f"`scaling.scale` is missing: it must be {wanted}")
        fields |= {"scale": scale, "shift": 0.0 if shift is None else shift}
        return False, 1.0
    if mean is None or std is None or shift is not None or isinstance(scale, tuple):
        raise _WrongError(
            scaling.keys,
            "`scaling` must give `mean` and `std` together, with one `scale` (1 where it is left "
            "out) and without `shift`: scaled = (raw - mean) * scale / std",
        )
    count = max(len(value) if isinstance(value, tuple) else channels for value in (mean, std))
    means = mean if isinstance(mean, tuple) else (mean,) * count
    deviations = std if isinstance(std, tuple) else (std,) * count
    if not all(deviation > 0 for deviation in deviations):
        raise _WrongError((*scaling.keys, "std"), "`scaling.std` must be above 0")
    factor = 1.0 if scale is None else scale
    fields |= {"scale": tuple(factor / deviation for deviation in deviations), "shift": means}
    return True, factor


def _packing(packing: _Mapping | None, fields: dict[str, Any]) -> None:
    if packing is None:
        return
    fields["packed_patch"] = packing.take("patch", _whole(1, 16), "a number of cells from 1 to 16")
    fields["packed_order"] = packing.take("order", _one_of(ORDERS), " or ".join(ORDERS))
    packing.close()


def _statistics(statistics: _Mapping | None, channels: int, fields: dict[str, Any]) -> str:
    if statistics is None:
        return ""
    numbers = _list_of(channels, _number)
    wanted = f"a list of {channels} finite numbers"
    fields["mean"] = statistics.take("mean", numbers, wanted)
    fields["std"] = statistics.take("std", numbers, wanted)
    if not all(deviation > 0 for deviation in fields["std"]):
        raise _WrongError((*statistics.keys, "std"), "`statistics.std` must be above 0")
    source: str = statistics.take("source", _text, "text", "")
    statistics.close()
    return source


def _view(view: _Mapping | None, channels: int) -> RGBView | None:
    if view is None:
        return None
    pixel = _list_of(3, _number)
    found = RGBView(
        factors=view.take(
            "factors", _list_of(channels, pixel), f"{channels} lists of 3 finite numbers"
        ),
        bias=view.take("bias", pixel, "a list of 3 finite numbers", (0.0, 0.0, 0.0)),
        scaled=view.take("acts_on", _one_of(("scaled", "raw")), "scaled or raw") == "scaled",
        source=view.take("source", _text, "text", ""),
        r2=view.take("r2", pixel, "a list of 3 finite numbers", None),
    )
    view.close()
    return found


def _vae(vae: _Mapping | None) -> Vae | None:
    if vae is None:
        return None
    found = Vae(
        name=vae.take("name", _text, "text"),
        classes=vae.take("classes", _texts, "a list of class names", ()),
        by_class_only=vae.take("by_class_only", _flag, "true or false", False),
        scaling_factor=vae.take("scaling_factor", _number, "a finite number", None),
    )
    vae.close()
    return found


# -- kinds of values: ValueError or TypeError for another one --------------------------------


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _list_of(count: int, item: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def kind(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(value)
        return tuple(_item(item, index, one) for index, one in enumerate(value))

    return kind


def _item(kind: Callable[[Any], Any], index: int, value: Any) -> Any:
    try:
        return kind(value)
    except (ValueError, TypeError) as error:
        raise _ItemError(index, value, error) from error


def _numbers(*counts: int) -> Callable[[Any], float | tuple[float, ...]]:
    def kind(value: Any) -> float | tuple[float, ...]:
        if not isinstance(value, list):
            return _number(value)
        return _list_of(len(value) if len(value) in counts else counts[0], _number)(value)

    return kind


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def kind(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(value)
        return value

    return kind


def _exactly(wanted: int) -> Callable[[Any], int]:
    return _whole(wanted, wanted)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(value)
    return tuple(_text(one) for one in value)


def name_of(value: Any) -> str:
    """A space's name. Raises ValueError for what cannot be one."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(value)
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(value)
    return tuple(name_of(one) for one in value)


def _one_of(values: tuple[str, ...]) -> Callable[[Any], str]:
    def kind(value: Any) -> str:
        if value not in values:
            raise ValueError(value)
        return str(value)

    return kind


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return visible(repr(value), 60)
