"""The known spaces for people: one row each, and the same as a page's table."""

from __future__ import annotations

from typing import Any

from latentguard.spaces.records import SpaceRecord
from latentguard.spaces.space import RECORDS, SCALINGS, LatentSpace, all_spaces

COLUMNS = ("space", "channels", "pixels", "frames", "scaled", "tokens", "RGB view", "models")


def rows() -> list[dict[str, Any]]:
    """One row a space, in the order of `COLUMNS`: those that ship, then one's own."""
    shipped = [_row(record.name, record) for record in RECORDS.values()]
    return shipped + [_row(s.name, None, s) for s in all_spaces() if s.name not in RECORDS]


def markdown() -> str:
    """The spaces that ship, as docs/spaces.md has them."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for name, record in RECORDS.items():
        row = _row(name, record)
        row["space"] = f"`{name}`"
        lines.append(" | ".join(str(row[column]) for column in COLUMNS))
    return "\n".join(f"| {line} |" for line in lines)


def _row(name: str, record: SpaceRecord | None, space: LatentSpace | None = None) -> dict[str, Any]:
    space = space or SCALINGS.get(name) or LatentSpace.get(name)
    models = () if record is None else record.used_by
    values = (
        name,
        space.channels,
        space.vae_scale_factor,
        space.temporal_factor,
        _scaling(space),
        _tokens(space),
        _view(space, record),
        ", ".join(models),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _scaling(space: LatentSpace) -> str:
    if space.statistics_of_vae == "batch_norm":
        return "(raw - mean) / sqrt(var + eps) for each packed channel, buffers of the VAE"
    if space.statistics_of_vae == "mean_std":
        return "(raw - mean) / std for each channel, buffers of the VAE"
    if isinstance(space.scale, tuple) or isinstance(space.shift, tuple):
        return "(raw - shift) * scale for each channel"
    return f"(raw - {space.shift:g}) * {space.scale:g}" if space.shift else f"raw * {space.scale:g}"


def _tokens(space: LatentSpace) -> str:
    if space.packed_order is None:
        return "none"
    if space.packed_patch == 1:
        return "one a cell"
    return f"{space.packed_patch}x{space.packed_patch} cells, {space.packed_order}"


def _view(space: LatentSpace, record: SpaceRecord | None) -> str:
    view = space.rgb_view
    if view is None:
        return "none"
    said = f"of {'scaled' if view.scaled else 'raw'} latents"
    if view.r2 is not None:
        said += f", R² {', '.join(f'{value:.2f}' for value in view.r2)}"
    return f"{said}; too coarse" if record is not None and record.view_missing else said
