"""Latents files: reading them safely, one image at a time, and writing them with their convention.

Reading order: bounds.py (limits on sizes) -> claims.py (what a file says about itself) ->
options.py (what the caller says about files) -> choice.py (which arrays are the latents) with
beside.py (what the others are) and numbers.py (types of numbers) -> streams.py, zip_archive.py,
compressed.py (bytes and archives) -> one reader per format (numpy_files.py, safetensors_files.py,
torch_files.py, and tar.py with shards.py), with signatures.py and explain.py for what a file is
instead -> passed_over.py (what is not read) -> paths.py (folders and patterns) -> reading.py (paths
to records) -> writing.py, and labels.py (classes of images). No reader unpickles anything, or needs
torch.
"""

from __future__ import annotations

from latentguard.files.options import DEQUANTIZATIONS, DTYPES, Dtype, Options, Reading
from latentguard.files.passed_over import PassedOver
from latentguard.files.paths import SUFFIXES
from latentguard.files.reading import (
    ArrayRecord,
    Record,
    load_latents,
    read_arrays,
    read_latents,
    read_records,
)
from latentguard.files.writing import save_latents

__all__ = [
    "DEQUANTIZATIONS",
    "DTYPES",
    "SUFFIXES",
    "ArrayRecord",
    "Dtype",
    "Options",
    "PassedOver",
    "Reading",
    "Record",
    "load_latents",
    "read_arrays",
    "read_latents",
    "read_records",
    "save_latents",
]
