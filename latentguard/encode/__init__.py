"""Pictures to latents, as the VAE of a generator encodes them.

Reading order: pictures.py (bytes to RGB) and framing.py (which part, at which size) -> samples.py
-> folders.py, tars.py, tables.py (where pictures are) -> sources.py (paths to units of work) ->
distribution.py, tiny.py, diffusers_vae.py -> autoencoders.py -> cache.py -> encoding.py (samples to
latents) -> journal.py, shards.py, run.py (a folder of shards), latents_file.py (one file), and
picture_set.py (what other rooms call).
"""

from __future__ import annotations

from latentguard.encode.autoencoders import Autoencoder, load_autoencoder
from latentguard.encode.picture_set import EncodedPicture, EncodedPictures, encode_pictures

__all__ = [
    "Autoencoder",
    "EncodedPicture",
    "EncodedPictures",
    "encode_pictures",
    "load_autoencoder",
]
