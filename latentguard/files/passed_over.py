"""Files that a scan does not read: whether they could hold latents, and a count of the others.

A file or member that could hold latents but is not read must be an error, or a scan would say
"allow" for something that it did not look at. All others are counted by their suffix, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from latentguard.files.tar import is_header
from latentguard.text import counted

HEAD = 512
"""How many bytes of a file `could_hold_latents` looks at, the size of a .tar header."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".br", ".z")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Formats of tensors, arrays, pickles, tables and archives. A raw dump of numbers has no mark of its
# own, so its usual suffixes count, too.
_HOLDERS = _words(
    """
    .pt .pth .safetensors .npy .npz .latent .latents .ckpt .bin .pkl .pickle .p .pyd .joblib .dill
    .h5 .hdf5 .hdf .he5 .nc .mat .zarr .zarray .zgroup .n5 .parquet .arrow .feather .lance .orc
    .avro .mds .tfrecord .tfrecords .record .beton .lmdb .mdb .db .sqlite .sqlite3 .msgpack .mp
    .cbor .ten .tb .onnx .gguf .ggml .raw .dat .memmap .mmap .f16 .f32 .bf16 .tensor .tensors
    .tar .tgz .tbz .tbz2 .txz .tzst .zip .7z .rar .pack
    """
)
# Text, pictures, sound and what systems leave behind: no tool keeps latents in these.
_HARMLESS = _words(
    """
    .txt .md .rst .json .jsonl .ndjson .yaml .yml .toml .ini .cfg .conf .xml .html .htm .css .js
    .ts .csv .tsv .log .py .pyc .ipynb .sh .bat .c .h .cpp .cu .lock .sha256 .md5 .sig .tex .pdf
    .doc .docx .odt .svg .jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif .jxl .heic .heif .ppm
    .pgm .pbm .ico .exr .hdr .psd .mp4 .webm .mkv .mov .avi .mp3 .wav .flac .ogg .m4a .cls .cls2
    .cap .caption .tags .srt .vtt .ttf .otf .woff .woff2 .ds_store .gitignore .gitattributes
    .gitkeep
    """
)
# These are zip archives, too.
_DOCUMENTS = _words(".docx .odt")
# zip (torch.save, .npz), NumPy, HDF5, Parquet, Arrow, gzip, bzip2, xz, Zstandard, LZ4, 7z, GGUF.
_MAGIC = re.compile(
    rb"PK\x03\x04|PK\x05\x06|\x93NUMPY|\x89HDF|PAR1|ARROW1|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"
    rb"|\x04\x22\x4d\x18|7z\xbc\xaf|GGUF|\x80[\x02-\x05]"
)
# Those of them with which no text begins.
_NUMBERS = re.compile(rb"PK\x03\x04|\x93NUMPY|\x89HDF|\x80[\x02-\x05]")
_SAFETENSORS_HEADER = 100_000_000  # the most that the format allows, in bytes
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_SUFFIXES = 40
_NAMED = 3
_MAX_NAME = 120


def suffix_of(name: str) -> str:
    """The suffix that says what a file holds, in lower case and without that of a compression.

    Empty where there is none. Spaces and dots at the end, which some systems drop, do not count.
    """
    name = name.rpartition("/")[2].lower().rstrip(" .")
    while name.endswith(COMPRESSED):
        name = name.rpartition(".")[0]
    _, dot, suffix = name.rpartition(".")
    return dot + suffix if dot else ""


def is_harmless(name: str) -> bool:
    """Whether a name alone says that a file holds no latents."""
    return suffix_of(name) in _HARMLESS


def could_hold_latents(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file that is not read could hold latents.

    Args:
        head: gives its first `HEAD` bytes. A file named as text or a picture could hold latents,
            too, if its contents begin like tensors.
    """
    suffix = suffix_of(name)
    if suffix in _HARMLESS:
        return suffix not in _DOCUMENTS and _begins_as(_NUMBERS, head())
    return suffix in _HOLDERS or _begins_as(_MAGIC, head())


def begins_as_numbers(head: bytes) -> bool:
    """Whether some bytes begin as tensors, arrays or pickles do."""
    return _begins_as(_NUMBERS, head)


def is_apple_double(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is what macOS writes beside another (`._NAME`): attributes, no content."""
    if not name.rpartition("/")[2].startswith("._"):
        return False
    # A .tar begins with the name of its first member, which can be any bytes.
    start = head()
    return start.startswith(_APPLE_DOUBLE) and not is_header(start)


def _begins_as(magic: re.Pattern[bytes], head: bytes) -> bool:
    if magic.match(head) or is_header(head):
        return True
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_HEADER


@dataclass
class PassedOver:
    """Counts of what was not read, because it cannot hold latents or the operator asked for it.

    files: of folders, by suffix. members: of shards, likewise. links: to folders that are read
    under another name. texts: arrays beside latents that are text embeddings by their name.
    left, left_members: arrays of files and members of shards that could be latents, where the
    operator named those that count (`Reading.key`, `Reading.member`).
    names: the first few files of folders.
    """

    files: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    links: int = 0
    texts: int = 0
    left: int = 0
    left_members: int = 0
    names: list[str] = field(default_factory=list)

    def add_file(self, name: str, path: str | None = None) -> None:
        """Count a file of a folder; the path names it."""
        _count(self.files, name)
        if len(self.names) < _NAMED:
            shown = (name if path is None else path)[-_MAX_NAME:]
            self.names.append("".join(c if c.isprintable() else "?" for c in shown))

    def add_member(self, name: str) -> None:
        """Count a member of a shard."""
        _count(self.members, name)

    def add(self, other: PassedOver) -> None:
        """Count what another part of the same scan has passed over, too."""
        for mine, theirs in ((self.files, other.files), (self.members, other.members)):
            for label, count in theirs.items():
                mine[label if label in mine or len(mine) < _SUFFIXES else "other"] += count
        self.links += other.links
        self.texts += other.texts
        self.left += other.left
        self.left_members += other.left_members
        self.names = (self.names + other.names)[:_NAMED]

    def line(self) -> str:
        """One line that counts and names them; empty where there are none."""
        parts = []
        if self.files:
            parts.append(_named(self.files, "file"))
        if self.members:
            parts.append(_named(self.members, "shard member"))
        if self.links:
            parts.append(f"{counted(self.links, 'link')} to folders that are read")
        if self.texts:
            parts.append(f"{counted(self.texts, 'array')} of text embeddings")
        line = f"passed over, because they are not latents: {', '.join(parts)}" if parts else ""
        aside = []
        if self.left:
            aside.append(f"{counted(self.left, 'other array')} (--key)")
        if self.left_members:
            aside.append(f"{counted(self.left_members, 'other shard member')} (--member)")
        said = f"skipped on request: {', '.join(aside)}" if aside else ""
        more = ", ..." if self.files.total() > len(self.names) else ""
        named = f"the first files: {', '.join(self.names)}{more}" if self.names else ""
        return "; ".join(filter(None, (line, named, said)))


def _count(counts: Counter[str], name: str) -> None:
    label = _label(name)
    # A folder of a million suffixes must not become a million counts.
    counts[label if label in counts or len(counts) < _SUFFIXES else "other"] += 1


def _label(name: str) -> str:
    """The suffix as it may stand in a report; names are untrusted."""
    if name.rpartition("/")[2].startswith("._"):
        return "._*"
    suffix = suffix_of(name)
    if not suffix:
        return "no suffix"
    plain = len(suffix) <= 16 and suffix.isascii() and suffix[1:].replace("_", "").isalnum()
    return suffix if plain else "other"


def _named(counts: Counter[str], noun: str) -> str:
    named = ", ".join(f"{label} {count:,}" for label, count in counts.most_common())
    return f"{counted(counts.total(), noun)} ({named})"
