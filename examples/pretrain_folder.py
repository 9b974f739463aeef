"""Pretrains on your own images: python examples/pretrain_folder.py IMAGES RUN [KEY=VALUE ...].

IMAGES is a folder of image files, flat or one subfolder per class (needs the extra `data`); RUN is
the folder to write. KEY=VALUE changes the config, such as batch_size=64 epochs=20 method=byol.
Run the same command again to resume.
"""

import sys

import ssl_jax
from ssl_jax.config import apply_overrides, default_config
from ssl_jax.train import pretrain

images, run, *changes = sys.argv[1:]

config = default_config()  # SimCLR, ResNet-50, two views of 224 pixels
config.data.update(name="folder", dir=images)
config.dtype = "bfloat16"
# As recommended by the paper for small batches; the same as configs/simclr_folder.py.
config.optim.update(lr=0.075, lr_scaling="sqrt", weight_decay=1e-4)
pretrain(apply_overrides(config, changes), run)
encoder = ssl_jax.load(run)

print(f"{run}: encoder of step {encoder.step}; features = encoder.apply(images)")
