"""SimCLR v1 on ImageNet, the official recipe; the variant is the batch: `simclr_imagenet.py:8192`.

Paper: Chen et al., 2020, arXiv:2002.05709; google-research/simclr. ResNet-50, 1,000 epochs, batch
4096, LARS 0.3·B/256, weight decay 1e-6. Published: 69.1 % linear. Cost: 49 GFLOP per image, 1.3e9
images; an accelerator pod. Images come from folders: --config.data.dir=PATH/train,
--config.data.test_dir=PATH/val. As the official code does, it trains on twice the paper's loss.
Deviation: blur draws its sigma per image, not per replica batch.
"""

from ml_collections import ConfigDict

from ssl_jax.config import default_config
from ssl_jax.recipes import simclr_views


def get_config(variant: str = "4096") -> ConfigDict:
    """The run."""
    config = default_config()
    config.data.name = "folder"
    config.batch_size = int(variant)
    config.epochs = 1000.0
    config.count_steps = "images"
    config.dtype = "bfloat16"
    config.views = simclr_views()
    config.simclr.loss_scale = 2.0
    return config
