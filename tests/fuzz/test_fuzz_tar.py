"""Structures of .tar: whatever tarfile hands out as latents is read here, or the shard is an error.

Archives are built header by header. Many hold a whole member within another one's data, which a
reader sees as soon as it goes on at another place.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections import Counter

from latentguard.errors import LatentsError
from latentguard.files.passed_over import PassedOver
from latentguard.files.shards import read_samples

BLOCK = 512
HOLDERS = (".npy", ".pt", ".pth", ".npz", ".safetensors")
MODES = ("r", "r|*")
NAMES = (
    b"a.latent.npy", b"b.latent.pt", b"d/c.latent.npz", b"a.json", b"a.jpg", b"a.txt", b"",
    b"g.LATENT.NPY", b"h.v2/i.latent.safetensors", b"\xff\xfe.latent.npy", b"._a.latent.npy",
    b"k" * 92 + b".latent.npy",
)  # fmt: skip
OTHER_NAMES = (b"e.npy", b"./f.latents.pt")
DECOYS = (b"README.txt", b"a.jpg", b"a.latent.npy", b"z.latent.npy", b"d/", b"m.latent.pt/", b"n")
KINDS = (b"0", b"\0", b"7", b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"V", b"M", b"D", b"N", b"Z")
Found = list[tuple[str, bytes]]


def structures(seed: int, count: int) -> Counter[str]:
    """Build and compare `count` archives.

    Returns counts: tried, agreed (no error, and all that tarfile hands out is read), refused (an
    error says that something is not read), disagreed.
    """
    counts: Counter[str] = Counter()
    for index in range(seed, seed + count):
        data = archive(random.Random(index))
        counts["tried"] += 1
        ours, refused = read_here(data)
        if refused:
            counts["refused"] += 1
            continue
        theirs = {mode: read_there(data, mode) for mode in MODES}
        missed = [mode for mode, found in theirs.items() if found != ours[: len(found)]]
        counts["disagreed" if missed else "agreed"] += 1
        for mode in missed:
            print(f"disagreement: tar {index}: {mode}: {theirs[mode]} against {ours}")
    return counts


def read_here(data: bytes) -> tuple[Found, bool]:
    """Names and bytes of the latents that are read, and whether there is an error."""
    found, refused = [], False
    for sample in read_samples(io.BytesIO(data), len(data), PassedOver()):
        if isinstance(sample, LatentsError):
            refused = refused or not str(sample).startswith("holds no KEY")
            continue
        for member in sample.latents:
            assert member.name.startswith(sample.key)
            found.append((member.name, data[member.start : member.start + member.size]))
    return found, refused


def read_there(data: bytes, mode: str) -> Found:
    """The same as tarfile has it, up to the first exception."""
    found: Found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode=mode, encoding="utf-8") as opened:  # type: ignore[call-overload]
            for info in opened:
                # A name with slashes at its end is extracted without them.
                name = info.name.rstrip("/")
                if name.lower().endswith(HOLDERS) and not info.issym() and not info.islnk():
                    content = opened.extractfile(info)
                    if content is not None:
                        found.append((name, content.read()))
    except Exception:  # whatever it raises, it hands out no more
        pass
    return [item for item in found if not apple_double(*item)]


def apple_double(name: str, content: bytes) -> bool:
    return name.rpartition("/")[2].startswith("._") and content.startswith(b"\x00\x05\x16\x07")


# -- building --------------------------------------------------------------------------------


def archive(chance: random.Random) -> bytes:
    """Up to four members with their extension headers, then an end mark; here and there not."""
    strange = chance.choice([0.0, 0.01, 0.03, 0.06])
    data = b"".join(member(chance, strange) for _ in range(chance.randrange(1, 5)))
    end = bytes(BLOCK * chance.choice([2, 2, 1, 20]))
    if chance.random() < strange:
        end = chance.choice([b"", b"\0" * 700, end + b"behind", end + bytes(400)])
    data += end
    if chance.random() < 0.05:
        data += member(chance, strange) + end
    if chance.random() < strange / 2:
        data = data[: chance.randrange(len(data) + 1)]
    if chance.random() < strange / 2:
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(data) or 1)] = chance.randrange(256)
        data = bytes(changed)
    return data or b"\0"


def member(chance: random.Random, strange: float, depth: int = 0) -> bytes:
    """A member with the extension headers before it."""

    def rare(probability: float = 1.0) -> bool:
        return chance.random() < strange * probability

    name = chance.choice(OTHER_NAMES if chance.random() < 0.01 else NAMES)
    kind = chance.choice(KINDS) if rare(3) else chance.choice([b"0", b"0", b"0", b"\0", b"7"])
    content = chance.randbytes(chance.choice([0, 1, 100, 511, 512, 513, 1024]))
    if depth < 2 and chance.random() < 0.3:
        content = member(chance, strange, depth + 1)
    size = len(content)
    extensions = b""
    own = name[-100:]
    if chance.random() < 0.3:
        for _ in range(chance.choice([1, 1, 1, 2, 3]) if strange else 1):
            extensions += extension(chance, strange, name, size)
        own = chance.choice([own, *DECOYS])
    if rare(2):
        own = chance.choice(DECOYS)
    stated = size
    if rare():
        stated = chance.choice([0, size + 1, size + BLOCK, 2 * size, 1 << 40])
    elif kind in b"123456" and not rare(5):
        stated, content = 0, b""
    body = content + bytes(-len(content) % BLOCK)
    if rare():
        body = chance.choice([body + bytes(BLOCK), body[:-BLOCK], content])
    sparse_map = b""
    if kind == b"S" and chance.random() < 0.3:
        sparse_map = bytes(504) + chance.choice([b"\0", b"\1"]) + bytes(7)
    prefix = chance.choice([b"", b"", b"", b"p", b"p/q", b"x.latent.npy"]) if rare(3) else b""
    return (
        extensions
        + header(chance, own, stated, kind, rare, prefix, bool(sparse_map))
        + (sparse_map + body)
    )


def extension(chance: random.Random, strange: float, name: bytes, size: int) -> bytes:
    """A GNU long name or link, or a pax header for one member or for all behind it."""

    def rare(probability: float = 1.0) -> bool:
        return chance.random() < strange * probability

    kind = chance.choice([b"L", b"x", b"x", b"g", b"K", b"X"] if strange else [b"L", b"x"])
    if kind in b"LK":
        body = name + b"\0"
        if rare(3):
            body = chance.choice(
                [name, name + b"\0b.latent.npy", b"", b"\0", b"n" * 500 + b"/" + name, name + b"/"]
            )
    else:
        records = [] if kind == b"g" else [(b"path", name)]
        more = [
            (b"mtime", b"12.5"), (b"comment", b"abc\ndef"), (b"uid", b"x"), (b"ctime", b"1"),
            (b"hdrcharset", b"BINARY"), (b"linkpath", b"b.latent.npy"), (b"SCHILY.ino", b"3"),
            (b"size", str(size).encode()),
        ]  # fmt: skip
        records += chance.sample(more, chance.randrange(3))
        if rare(4):
            records += chance.choices(
                [
                    (b"path", b"x.latent.npy"), (b"path", b"y.txt"), (b"path", name + b"/"),
                    (b"path", b""), (b"path", b"a.latent.npy\0.txt"), (b"path", b"\xff.latent.npy"),
                    (b"size", b"0"), (b"size", b"512"), (b"size", b"-512"), (b"size", b"1_0"),
                    (b"size", b" 5"), (b"size", b""), (b"size", b"x"), (b"size", b"1024.0"),
                    (b"GNU.sparse.name", b"s.latent.npy"), (b"GNU.sparse.size", b"100"),
                    (b"GNU.sparse.realsize", b"700"), (b"GNU.sparse.map", b"0,10,20,10"),
                    (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"x=y", b"z"),
                    (b" path", b"w.latent.npy"), (b"pa\nth", b"1"), (b"", b"1"),
                    (b"hdrcharset", b"utf-16"), (b"hdrcharset", b"\xff"),
                ],
                k=chance.randrange(1, 3),
            )  # fmt: skip
            chance.shuffle(records)
        body = b"".join(record(key, value) for key, value in records)
        if rare(2):
            body = chance.choice(
                [
                    body + b"12 path=b.x", body[:-1], body + b"junk", b"0 path=x\n" + body,
                    body.replace(b" ", b"  ", 1), body + b"\0" * 20, b"0" + body, body[1:],
                    body + b"999999999 path=x.latent.npy\n", body.replace(b"\n", b"\0"),
                ]
            )  # fmt: skip
    padding = bytes(-len(body) % BLOCK)
    if rare(2):
        more_body = chance.choice([record(b"path", b"hidden.latent.npy"), b"tail.latent.npy", b"x"])
        padding = (more_body + padding)[: len(padding)]
    stated = len(body)
    if rare():
        stated = chance.choice([max(0, len(body) - 1), len(body) + 1, len(body) + BLOCK, 0])
    return header(chance, b"././@LongLink", stated, kind, rare, b"", False) + body + padding


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


def header(
    chance: random.Random,
    name: bytes,
    size: int,
    kind: bytes,
    rare: object,
    prefix: bytes,
    extended: bool,
) -> bytes:
    """512 bytes, field by field."""
    assert callable(rare)
    block = bytearray(BLOCK)
    block[: len(name[:100])] = name[:100]
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    digits = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    if chance.random() < 0.1 or (rare() and size < 8**10):
        digits = b"\x80" + size.to_bytes(11, "big")
        if rare(5) and size < 8**10:
            digits = chance.choice(
                [
                    b"%11o " % size, b"%o\0" % size, b"%o" % size, b"+%010o\0" % size,
                    b"0o%09o\0" % size, b"%o_0\0" % size, b"\0%010o\0" % size, b"\t%010o\0" % size,
                    b"\xff" + b"\xff" * 9 + b"\xfe\0", b"\x81" + bytes(9) + size.to_bytes(2, "big")
                    if size < 65536 else b"", b"%o\0%o" % (size, size), b"-%010o\0" % size,
                ]
            )  # fmt: skip
    block[124:136] = digits[:12].ljust(12, b"\0")
    block[136:148] = b"00000000000\0"
    if rare():
        at = chance.choice([100, 108, 116, 136, 329, 337])
        block[at : at + 3] = chance.choice([b"abc", b"\xff\xff\xff", b"9  ", b"-1 "])
    block[156:157] = kind
    block[257:265] = chance.choice([b"ustar\00000", b"ustar  \0", bytes(8)])
    block[345 : 345 + len(prefix)] = prefix
    block[482] = 1 if extended else block[482]
    if rare(0.5):
        start = chance.choice([b"\x1f\x8b\x08", b"BZh91AY&SY", b"\xfd7zXZ", b"\x5d\0\0\x80"])
        block[: len(start)] = start
    block[148:156] = b" " * 8
    total = sum(block)
    if rare():
        total -= chance.choice([1, -1, 256 * sum(b > 127 for b in block)])
    form = chance.choice([b"%06o\0 ", b"%06o \0", b"%07o\0", b"%6o\0 "])
    block[148:156] = (form % max(0, total))[:8]
    return bytes(block)


def test_what_tarfile_hands_out_is_read_or_the_shard_is_an_error() -> None:
    counts = structures(0, 3000)
    assert counts["disagreed"] == 0
    assert counts["agreed"] > 1000
    assert counts["refused"] > 500
