"""Making an encoder for a latent space from a pixel-space teacher and a folder of photos.

Reading order: images.py -> autoencoders.py, teacher.py -> cache.py (latents and targets on disk)
-> train.py (the two recipes) -> run.py. For the reader of any space's view: small_autoencoders.py,
view_cache.py, views.py (errors of views) -> view_recipe.py.
"""
