"""How large the parts of a latents file may be. Files are untrusted: sizes are checked, never
believed, and nothing is allocated for a size that the file itself does not hold.
"""

from __future__ import annotations

MIB = 2**20

# One image: 1,024 x 1,024 cells are 8,192 x 8,192 pixels, beyond what any known pipeline makes;
# in float32 with 32 channels that is 128 MiB, the most that is held at a time.
MAX_IMAGE_CELLS = 1024 * 1024
# The JSON header of a safetensors file: room for the ids of 100,000 images. The format allows 100
# MB, which Python would turn into gigabytes of objects.
MAX_SAFETENSORS_HEADER = 8 * MIB
# A .npy header is a line of text; numpy's own limit for an untrusted one is 10,000 characters.
MAX_NPY_HEADER = 10_000
# The structure (not the numbers) of a .pt file: some 30,000 tensors in one list. It is interpreted
# one opcode at a time, about 2 seconds for the whole of it.
MAX_PICKLE = 4 * MIB
# The table of contents of a zip archive (.pt, .npz), which is read as a whole.
MAX_ZIP_DIRECTORY = 16 * MIB
# A compressed .npz may grow to this; what is larger is better stored uncompressed.
MAX_INFLATED = 4096 * MIB
# Latents hardly shrink; blank ones do, by a thousand. Beyond MIN_INFLATED bytes, a compressed array
# may be this many times its size in the file.
MAX_RATIO = 64
MIN_INFLATED = 256 * MIB
# What is unpacked from a gzip file stays in memory up to this, and is a temporary file beyond.
MAX_SPOOLED = 64 * MIB
# Arrays of an .npz beside its latents: each header is read, to tell whether it is of latents, too.
MAX_BESIDE = 1000
# Axes of an array: latents have four at most, and the product of a million sizes takes minutes.
MAX_AXES = 8
# Text that says something about latents: a shard's KEY.json, a tar extension header.
MAX_METADATA = MIB
# The tensors of a .pt may overlap: a list may hold one several times, but not a million times. In
# all, this many times the file's size is read, and MIN_READING more.
MAX_REPEATS = 16
MIN_READING = 64 * MIB
# What reading a tensor counts for besides its numbers.
TENSOR_COST = 1024
# An image whose numbers lie scattered, or images that interleave (also those of an array in
# Fortran order), are read at once up to this.
MAX_GATHERED = 256 * MIB
# An image's name; longer ones would swamp every report.
MAX_ID = 1024
# Empty and damaged blocks of a shard, which are searched for further members: an archive ends with
# some kilobytes of them, and damage to the header of a large member leaves its data.
MAX_SHARD_GAPS = 256 * MIB
# Latents of one key of a shard, which are kept until the key's KEY.json has been met.
MAX_SHARD_SAMPLE = 4096
# The footer of a Parquet file: some 100,000 row groups. It is read as a whole.
MAX_PARQUET_FOOTER = 16 * MIB
# Rows of a table that are read together, in bytes.
MAX_BATCH_BYTES = 16 * MIB
# The index.json of an MDS folder: some 100,000 shards. It is read as a whole.
MAX_MDS_INDEX = 64 * MIB
# A number of latents, as `judge.numbers.LARGEST` is for arrays that come from elsewhere.
MAX_MAGNITUDE = 1e6
