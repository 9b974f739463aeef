"""SimCLR v1 on your own image folder: --config.data.dir=PATH, --config.data.test_dir=PATH.

Paper: Chen et al., 2020, arXiv:2002.05709; ResNet-50 at 224 pixels, batch 256, 100 epochs, global
BatchNorm, and square-root scaling of the learning rate, as the paper recommends for small batches
(appendix B.1). Views as in the official code (crop area 0.08 to 1, full color distortion, blur).
Without a test folder, --config.data.validation=0.2 holds out a fifth of the images to evaluate on.
Cost: 49 GFLOP per image; needs an accelerator.
"""

from ml_collections import ConfigDict

from ssl_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = default_config()
    config.data.name = "folder"
    config.dtype = "bfloat16"
    config.optim.update(lr=0.075, lr_scaling="sqrt", weight_decay=1e-4)
    return config
