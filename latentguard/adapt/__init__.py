"""Making an encoder for a latent space from a pixel-space teacher and a folder of photos.

Reading order: images.py -> autoencoders.py, teacher.py -> cache.py (latents and targets on disk)
-> train.py (the two recipes) -> card.py.
"""
