"""`bundled_guard`: a policy and a packaged model become a Guard, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.bank import BankRows
from latentguard.bundled.prepare import Array, grid_of, picture_of
from latentguard.bundled.text import NanoText
from latentguard.bundled.weights import Weights, read_graph, read_weights
from latentguard.encoders.any_view import of_space
from latentguard.encoders.catalog import ANY_VIEW, CATALOG, Entry, bundled_path
from latentguard.encoders.class_text import DIM, LOGIT_SCALE
from latentguard.encoders.nano_sizes import GRID
from latentguard.errors import ModelError
from latentguard.policy import Policy, load_policy
from latentguard.runtime import Batching, Guard
from latentguard.runtime.artifact import SCHEMA_VERSION, Artifact
from latentguard.runtime.names import BANK, INPUT
from latentguard.runtime.network import Network
from latentguard.runtime.scorer import MAX_CELLS
from latentguard.runtime.session import Provider
from latentguard.spaces import RECORDS, LatentSpace


def bundled_guard(
    policy: Policy | str | Path = "default",
    model: str = "auto",
    *,
    space: LatentSpace | str | Path | None = None,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    spin: bool = True,
    batching: Batching | None = None,
    warm_up: bool = True,
    max_cells: int = MAX_CELLS,
) -> Guard:
    """A Guard over a packaged model, for latents of any size.

    Args:
        policy: a Policy, the name of a shipped one, or a path. Prompts that are in no table of the
            package need the sentence encoder of the extra `nano`.
        model: `nano-flux2`, `nano-view`, or "auto": the best packaged model of `space`.
        space: the latent space, if neither the policy nor the model names it.
        providers, threads, spin, batching, warm_up, max_cells: as in `Guard`.

    Raises:
        PolicyError: the policy cannot be used.
        ModelError: no packaged model has that name or space, ONNX Runtime is missing, or the
            policy asks for something that needs torch: another model, a cascade, crops, learned
            examples.
        CoverageError (both of them): the model cannot see all of the policy's prompts.
        LatentsError: `space` is unknown, or has another scaling or order of tokens than the space
            of the same name that models read.
    """
    loaded = load_policy(policy)
    _check_plain(loaded)
    if space is not None:
        LatentSpace.of(space).check_standard("this guard")
    entry, own = chosen(loaded, model, space)
    weights = read_weights(bundled_path(entry.name))
    metadata = weights.metadata
    if metadata["kind"] == ANY_VIEW:
        metadata = metadata | of_space(metadata, own)
    name = entry.name if entry.same_as is not None else metadata["name"]
    rows = BankRows.build(loaded, NanoText(weights, name))
    artifact = _artifact(loaded, weights, metadata, name, own, rows)
    network = _Bundled(artifact, providers, threads, spin, rows, _front(weights, metadata))
    if warm_up:
        network.check()
    return Guard.over(artifact, network, batching=batching, max_cells=max_cells)


def packaged_text(model: str, space: LatentSpace | None = None) -> tuple[NanoText, str]:
    """The text side of a packaged model, and the space that it reads. Raises ModelError
    where no packaged model has that name, or it reads several spaces and `space` is None."""
    entry = _packaged(model)
    weights = read_weights(bundled_path(entry.name))
    own = entry.space or (None if space is None else space.name)
    if own is None:
        raise ModelError(_SEVERAL.format(entry.name))
    return NanoText(weights, entry.name), own


_SEVERAL = "model {} reads the RGB view of several latent spaces: say of which (space=..., --space)"


def _all_packaged() -> list[Entry]:
    return [entry for entry in CATALOG.values() if entry.bundled]


def _packaged(model: str) -> Entry:
    """The packaged model of a name. Raises ModelError."""
    for entry in _all_packaged():
        if entry.name == model:
            return entry
    names = ", ".join(entry.name for entry in _all_packaged())
    raise ModelError(
        f"model {model} needs torch: pip install 'latentguard[torch]' (--runtime torch). Without "
        f"it the packaged ones judge: {names}"
    )


class _Bundled(Network):
    """A packaged graph, which reads prepared latents and the concept bank."""

    def __init__(
        self,
        artifact: Artifact,
        providers: Sequence[Provider] | None,
        threads: int | None,
        spin: bool,
        rows: BankRows,
        front: Callable[[Array], Array],
    ) -> None:
        super().__init__(artifact, providers, threads, spin, warm_up=False)
        arrays = (rows.embeddings, rows.segments, rows.contrast, rows.contrast_segments)
        self._bank: dict[str, NDArray[Any]] = dict(zip(BANK, arrays, strict=True))
        self._front = front

    def _inputs(self, array: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        return {INPUT: self._front(array), **self._bank}


def _check_plain(policy: Policy) -> None:
    """Raise ModelError for what the packaged graphs do not do."""
    for asked, what in (
        (policy.cascade is not None, "a cascade"),
        (policy.views == "crops", "views: crops"),
    ):
        if asked:
            raise ModelError(
                f"policy '{policy.name}' asks for {what}, which is judged with torch: pip install "
                "'latentguard[torch]' (--runtime torch), or export the policy where torch is"
            )


def chosen(
    policy: Policy, model: str, space: LatentSpace | str | Path | None
) -> tuple[Entry, LatentSpace]:
    """The packaged model, and the space that it is to read. Raises ModelError."""
    wanted = policy.space if space is None else LatentSpace.of(space).name
    if model == "auto" and policy.model is not None:
        model = policy.model
    if model == "auto":
        if wanted is None:
            raise ModelError(
                "say which latent space, by space=... or --space, or name a model: the best one "
                "depends on the space"
            )
        found = next((entry for entry in _all_packaged() if entry.reads(wanted)), None)
        if found is None:
            raise ModelError(
                f"no packaged model reads latents of space {wanted}: it has no RGB view that is "
                "fine enough to be read"
            )
    else:
        found = _packaged(model)
    own = found.space or wanted
    if own is None:
        raise ModelError(_SEVERAL.format(found.name))
    if wanted is not None and not found.reads(wanted):
        raise ModelError(f"model {found.name} reads {own} latents, not {wanted}")
    if policy.space not in (None, own):
        raise ModelError(
            f"policy '{policy.name}' is written for {policy.space} latents, model {found.name} "
            f"reads {own}"
        )
    return found, LatentSpace.get(own)


def _artifact(
    policy: Policy,
    weights: Weights,
    metadata: dict[str, str],
    name: str,
    space: LatentSpace,
    rows: BankRows,
) -> Artifact:
    """What an export of this policy and model would say of itself."""
    own = {} if space.name in RECORDS else {"own_space": space.to_dict()}
    said: dict[str, Any] = {
        "own_space": None,
        "schema_version": SCHEMA_VERSION,
        "policy": policy.to_dict(),
        "prompts": list(rows.prompts),
        "covered": list(rows.covered),
        "seen": list(rows.seen),
        "unseen_contrast": list(rows.unseen_contrast),
        "model": {"name": name, "sha256": weights.sha256, "notes": metadata["card"]},
        "space": space.name,
        "scaled": metadata.get("scaled", "yes") == "yes",
        "channels": space.channels,
        "packed_patch": space.packed_patch,
        "dim": DIM,
        "logit_scale": LOGIT_SCALE,
        "precision": "fp32",
        "height": None,
        "width": None,
        "files": {weights.path.name: weights.sha256},
        "first": None,
        "crop_side": GRID if metadata["kind"] == "adapter" else None,
    } | own
    path, beside = weights.path.with_suffix(".onnx"), {weights.path.name: weights.data}
    return Artifact(path, weights.sha256, said, True, read_graph(weights), beside)


def _front(weights: Weights, metadata: dict[str, str]) -> Callable[[Array], Array]:
    """What the model does with latents before its graph."""
    config = json.loads(metadata["config"])
    if metadata["kind"] == ANY_VIEW:
        view = {key: np.asarray(config[key], np.float32) for key in ("factors", "bias")}
        return partial(picture_of, size=config["size"], octaves=config.get("octaves", 0), **view)
    net = {
        name: weights.tensors[f"net.adapter.{key}"].astype(np.float32)
        for name, key in (
            ("halve", "halve.weight"),
            ("bias", "halve.bias"),
            ("mean", "mean"),
            ("std", "std"),
        )
    }
    return partial(grid_of, **net)
