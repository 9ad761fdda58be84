"""Train an embedded base of a drawn world from nothing: `python -m agsm_rl.shapes.train_base KIND WORK_DIR OUT_DIR`.

KIND is `sd15`, `sdxl` or `sd3` (layouts.py). Three stages, as Stable Diffusion was made: an autoencoder
(autoencoder.py); text encoders, trained contrastively (text.py) or, of the scenes world, by words (words.py), and then
frozen; a denoiser, trained on captions that are careful, plain and careless (denoiser.py), of the scenes world also on
what is drawn where (representation.py). Each stage is seeded, writes its log to WORK_DIR, and goes on from its newest
checkpoint when started again. Bases of several kinds share a WORK_DIR: what they have in common is made once.
"""
