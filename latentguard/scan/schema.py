"""A record in Arrow's terms, and back: JSON lines and Parquet say the same.

Beside what `ScanRecord.to_dict` says, a row of a run has `__key__`, the key of the sample as
WebDataset forms it (elsewhere the record's id), and `occurrence`, which numbers the records of one
key within a shard from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentguard.errors import MissingExtraError
from latentguard.scan.record import ScanRecord

if TYPE_CHECKING:
    import pyarrow

# As webdataset.tariterators.base_plus_ext has it.
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_INSIDE = re.compile(
    r"(.*?[.](?:tar|parquet|mds(?:[.](?:zstd|zst|gz))?))::(.*)", re.DOTALL | re.IGNORECASE
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONCEPT = (
    "id",
    "category",
    "action",
    "margin",
    "probability",
    "prompt",
    "covered",
    "judged",
    "matched",
)


def need_pyarrow() -> None:
    """Raises MissingExtraError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Parquet needs pyarrow, which is not installed: pip install 'latentguard[scale]', or "
            "write JSON lines (--sink json)"
        ) from error


def split_source(source: str) -> tuple[str, str | None]:
    """The file and the part of it that a record names; None where it names none.

    A path may contain `::` itself: the first one behind the suffix of a shard or table counts.
    """
    found = _INSIDE.match(source)
    shard, inside, part = source.partition("::") if found is None else (found[1], "::", found[2])
    return shard, part if inside else None


def sample_key(source: str, name: str | None) -> str | None:
    """`__key__` of a record: WebDataset's key of the member it comes from, else its id.

    A row of a table has its id, or its place.
    """
    shard, member = split_source(source)
    if member is None:
        return name
    if shard and not shard.lower().endswith(".tar"):
        return member if name is None else name
    found = _KEY.fullmatch(member)
    return found[1] if found else member


class Numbering:
    """Numbers the records of one key within a shard."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def row(self, record: ScanRecord) -> dict[str, Any]:
        """A record as a row of a run: JSON-able, with `__key__` and `occurrence` first."""
        key = sample_key(record.source, record.id)
        occurrence = 0 if key is None else self._seen.get(key, 0)
        if key is not None:
            self._seen[key] = occurrence + 1
        return {"__key__": key, "occurrence": occurrence, **record.to_dict()}


def schema() -> pyarrow.Schema:
    """The columns of a run's Parquet files."""
    import pyarrow as pa

    text = pa.string()
    named = pa.struct([("name", text), ("sha256", text)])
    return pa.schema(
        [
            ("__key__", text),
            ("occurrence", pa.int32()),
            ("source", text),
            ("index", pa.int64()),
            ("id", text),
            ("space", text),
            ("schema_version", pa.int32()),
            ("decision", text),
            ("reason", text),
            ("error", text),
            ("noise_level", pa.float64()),
            ("concepts", pa.list_(_concept_type())),
            ("taxonomies", pa.list_(_scheme_type())),
            ("model", named),
            ("policy", pa.struct([("name", text), ("version", text), ("sha256", text)])),
        ]
    )


def _concept_type() -> pyarrow.DataType:
    import pyarrow as pa

    text, number, flag = pa.string(), pa.float64(), pa.bool_()
    types = (text, text, text, number, number, text, flag, flag, flag)
    threshold = pa.struct([("kind", text), ("value", number), ("margin", number)])
    return pa.struct(
        [
            *zip(_CONCEPT, types, strict=True),
            ("threshold", threshold),
            ("unseen", pa.list_(text)),
        ]
    )


def _scheme_type() -> pyarrow.DataType:
    """What an image is in one published scheme; severities is null where it has no levels."""
    import pyarrow as pa

    text = pa.string()
    category = pa.struct(
        [
            ("id", text),
            ("name", text),
            ("flagged", pa.bool_()),
            ("score", pa.float64()),
            ("unchecked", text),
        ]
    )
    return pa.struct(
        [
            ("scheme", text),
            ("version", text),
            ("categories", pa.list_(category)),
            ("severities", pa.list_(pa.int32())),
        ]
    )


def to_batch(rows: Sequence[Mapping[str, Any]]) -> pyarrow.RecordBatch:
    """Rows as a batch of `schema()`. Lone surrogates, which UTF-8 lacks, become escapes."""
    import pyarrow as pa

    columns = schema()
    arrays = [
        _concepts([row["concepts"] for row in rows])
        if column.name == "concepts"
        else pa.array([_schemes(row.get("taxonomies")) for row in rows], column.type)
        if column.name == "taxonomies"
        else pa.array([_sound(row[column.name]) for row in rows], column.type)
        for column in columns
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def _concepts(lists: Sequence[Sequence[Mapping[str, Any]]]) -> pyarrow.Array:
    """Column by column: several times as fast as row by row."""
    import pyarrow as pa

    kind = _concept_type()
    flat = [concept for concepts in lists for concept in concepts]
    offsets = [0]
    for concepts in lists:
        offsets.append(offsets[-1] + len(concepts))
    arrays = [pa.array([concept.get(field.name) for concept in flat], field.type) for field in kind]
    values = pa.StructArray.from_arrays(arrays, fields=list(kind))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _schemes(taxonomies: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """`Verdict.to_dict`'s `taxonomies` as the column of that name; null where there are none."""
    if taxonomies is None:
        return None
    return [
        {
            "scheme": scheme,
            "version": found["version"],
            "categories": [
                {
                    "id": category,
                    "name": name,
                    "flagged": category in found["flagged"],
                    "score": found["scores"][category],
                    "unchecked": _sound(found["unchecked"].get(category)),
                }
                for category, name in found["names"].items()
            ],
            "severities": _levels(found),
        }
        for scheme, found in taxonomies.items()
    ]


def _levels(found: Mapping[str, Any]) -> list[int | None] | None:
    levels = found.get("severities")
    return None if levels is None else [levels.get(category) for category in found["names"]]


def from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `ScanRecord.to_dict` gave, from a row of a run, of either sink."""
    data = {name: row[name] for name in row if name not in ("__key__", "occurrence")}
    data["concepts"] = [_concept(concept) for concept in row["concepts"]]
    return with_schemes(data)


def with_schemes(data: dict[str, Any]) -> dict[str, Any]:
    """A row with `taxonomies` as records have them, where the column holds them as Parquet does.

    Raises ValueError for what is neither.
    """
    schemes = data.get("taxonomies")
    if schemes is None:
        data.pop("taxonomies", None)
    elif isinstance(schemes, list):
        try:
            data["taxonomies"] = {found["scheme"]: _scheme(found) for found in schemes}
        except (KeyError, TypeError) as error:
            raise ValueError(f"taxonomies cannot be read: {error!r}") from error
    return data


def _scheme(found: Mapping[str, Any]) -> dict[str, Any]:
    categories = found["categories"]
    said: dict[str, Any] = {
        "version": found["version"],
        "names": {one["id"]: one["name"] for one in categories},
        "flagged": [one["id"] for one in categories if one["flagged"]],
        "scores": {one["id"]: one["score"] for one in categories},
        "unchecked": {one["id"]: one["unchecked"] for one in categories if one["unchecked"]},
    }
    if found["severities"] is not None:
        names = list(said["names"])
        said["severities"] = dict(zip(names, found["severities"], strict=True))
    return said


def _concept(concept: Mapping[str, Any]) -> dict[str, Any]:
    threshold = dict(concept["threshold"])
    if threshold.get("margin") is None:
        threshold.pop("margin", None)
    return {**concept, "threshold": threshold}


def _sound(value: Any) -> Any:
    if isinstance(value, str) and _SURROGATES.search(value):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value
