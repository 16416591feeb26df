"""Pictures for commands that read latents: `--autoencoder` encodes them first, and keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.bar import Bar

if TYPE_CHECKING:
    from latentguard.encode import EncodedPictures

AutoencoderOption = Annotated[
    str | None,
    typer.Option(
        help="Read the paths as pictures, and encode them with this autoencoder first (see "
        "`latentguard encode`)."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="With --autoencoder: size in pixels of the center crop that is encoded. Default: 512."
    ),
]
EncodedOption = Annotated[
    Path | None,
    typer.Option(
        "--encoded",
        help="With --autoencoder: the folder that keeps the encoded latents. Default: one in the "
        "cache.",
    ),
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download", help="Allow --autoencoder to be downloaded from the Hugging Face hub."
    ),
]


_DEEP = 4
"""Folders within one another, as ImageNet's splits and classes are."""


def _refuse_pictures(paths: Sequence[Path]) -> None:
    """Raises UsageError for a picture, or a folder of nothing but pictures.

    A folder that holds other files, too, may hold latents with previews beside them.
    """
    from latentguard.encode.pictures import SUFFIXES
    from latentguard.errors import UsageError

    for path in paths:
        found = _files(path)
        if found and all(one.suffix.lower() in SUFFIXES for one in found):
            raise UsageError(
                f"{path}: {found[0].name} is a picture, but this command reads latents: give "
                "--autoencoder, which encodes pictures first"
            )


def _files(path: Path) -> list[Path]:
    """A file, or the files of a folder; if it has only folders, the files of the first one."""
    for _ in range(_DEEP):
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        if not found or not all(one.is_dir() for one in found):
            return found
        path = found[0]
    return []


class Pictures:
    """The options about pictures. Raises UsageError if they are given without an autoencoder.

    autoencoder: None if the paths are latents. download: whether it may be downloaded from the hub.
    """

    def __init__(
        self,
        autoencoder: str | None,
        size: str | None,
        encoded: Path | None,
        space: str | None,
        device: str | None,
        download: bool = False,
    ) -> None:
        from latentguard.errors import UsageError

        self._size, self._encoded = size or "512", encoded
        self._autoencoder = None
        if autoencoder is not None:
            from latentguard.encode import load_autoencoder

            self._autoencoder = load_autoencoder(
                autoencoder, space, device=device, download=download
            )
        elif size is not None or encoded is not None:
            raise UsageError("--size and --encoded are about pictures: give --autoencoder, too")

    def latents(self, paths: Sequence[Path]) -> list[Path]:
        """The paths themselves, or one latents file for each picture that they lead to.

        Raises LatentsError for a picture that cannot be encoded.
        """
        found = self.encoded(paths)
        return list(paths) if found is None else found.files

    def encoded(self, paths: Sequence[Path]) -> EncodedPictures | None:
        """The pictures that the paths lead to, encoded; None where the paths are of latents.

        Raises LatentsError as `latents` does, and UsageError for pictures without an autoencoder.
        """
        if self._autoencoder is None:
            _refuse_pictures(paths)
            return None
        from latentguard.encode import encode_pictures
        from latentguard.encoders.catalog import cache_dir

        with Bar("encoding pictures") as advance:
            found = encode_pictures(
                paths,
                self._autoencoder,
                cache=self._encoded or cache_dir() / "encoded",
                size=self._size,
                progress=advance,
            )
        if found.passed:
            typer.echo(f"passed over, because they are not pictures: {found.passed}", err=True)
        return found
