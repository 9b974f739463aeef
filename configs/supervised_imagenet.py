"""Supervised cross-entropy on ImageNet: the baseline with all labels.

Paper: Goyal et al., 2017, arXiv:1706.02677. ResNet-50, 90 epochs, batch 1024, SGD 0.1·B/256, five
warmup epochs. Published: 76 % top-1. Cost: 24.5 GFLOP per view. One view per image, a crop (area
0.08 to 1) and a flip, as in the paper. Data: `recipes.imagenet_config`. Deviations: a cosine
instead of the paper's step schedule; computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.config import view
from ssl_jax.recipes import IMAGENET, imagenet_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "supervised"
    config.batch_size = 1024
    config.epochs = 90.0
    crop = {"sampler": "torchvision", "interpolation": "bilinear"}
    config.views = {
        "view1": view(crop=crop, jitter={"prob": 0.0}, gray=0.0, blur={"prob": 0.0}, **IMAGENET)
    }
    config.model.conv_init = "fan_out_normal"
    config.optim.update(
        name="sgd", lr=0.1, weight_decay=1e-4, decay_norm_bias=True, warmup_epochs=5.0
    )
    return config
