"""The error of a file that is not what its name says: one sentence on what it is and what to do."""

from __future__ import annotations

import io
from typing import BinaryIO

from latentguard.errors import LatentsError

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
_KINDS = {
    b"PK\x03\x04": "a zip archive, as .pt, .pth and .npz are",
    b"\x93NUMPY": "what numpy.save writes, a .npy",
    b"\x89HDF": "an HDF5 file",
    b"\x80": "a pickle",
}
_BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_TAR_MAGIC = slice(257, 262)


def check_start(stream: BinaryIO, size: int, expected: str) -> None:
    """LatentsError where the first bytes show a file of another kind; leaves the stream at 0.

    Args:
        stream: the file, or a shard's member, of `size` bytes.
        expected: what it should be, as in "a file of torch.save"; the kinds that such a file may
            begin as are not checked here.
    """
    stream.seek(0)
    start = stream.read(min(size, 512))
    stream.seek(0, io.SEEK_SET)
    if start[8:9] == b"{":
        return  # a safetensors file, which begins with the length of its header, whatever that is
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise LatentsError(
                f"is compressed with {name}: unpack it ({command}) and scan the result"
            )
    if start.startswith(_BOMS):
        raise LatentsError(
            f"begins with a byte order mark, so a text editor or converter has rewritten it: it is "
            f"no longer {expected}; take the original file"
        )
    if start[_TAR_MAGIC] == b"ustar":
        raise LatentsError(
            f"is a tar archive, not {expected}: if it is a WebDataset shard, name it .tar; if "
            "torch.save wrote it (before version 0.2), load it and save it anew"
        )


def kind_of(start: bytes) -> str | None:
    """The kind of file that begins like this, None if unknown."""
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)
