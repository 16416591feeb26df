"""Pictures where a command takes latents: `--autoencoder` encodes them first, and keeps them."""

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
        help="The paths are pictures, which this encodes first (see `latentguard encode`)."
    ),
]
SizeOption = Annotated[
    str | None, typer.Option(help="With --autoencoder: pixels of the middle that is encoded.")
]
EncodedOption = Annotated[
    Path | None,
    typer.Option(
        "--encoded", help="With --autoencoder: the folder of what was encoded; else the cache's."
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch an --autoencoder of the hub if need be.")
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
                f"{path}: {found[0].name} is a picture, and latents are read here: give "
                "--autoencoder, which encodes pictures first"
            )


def _files(path: Path) -> list[Path]:
    """A file, or what a folder holds; of folders of folders alone, what the first one holds."""
    for _ in range(_DEEP):
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        if not found or not all(one.is_dir() for one in found):
            return found
        path = found[0]
    return []


class Pictures:
    """What the options say of pictures. Raises UsageError where there are pictures' options alone.

    autoencoder: None where the paths are of latents. download: whether its name on the hub may be
    fetched.
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
            raise UsageError("--size and --encoded are of pictures: give --autoencoder, too")

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
            typer.echo(f"passed over, as they are no pictures: {found.passed}", err=True)
        return found
