"""VICReg on ImageNet, the official recipe; the variant is the epochs: `100` or `1000`.

Paper: Bardes et al., 2021, arXiv:2105.04906; facebookresearch/vicreg. ResNet-50, batch 2048, an
expander of three layers of 8,192, LARS with the learning rate outside the momentum, 0.2·B/256 (at
100 epochs 0.3·B/256 and batch 512). Published: 73.2 % linear at 1,000 epochs. Cost: 51 GFLOP per
image; an accelerator pod. Data: `recipes.imagenet_config`. Deviations: computed in bfloat16; every
epoch is without the last partial batch; the blur is an exact Gaussian.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import barlow_views, imagenet_config

RECIPES = {"100": (512, 0.3), "1000": (2048, 0.2)}  # epochs -> batch, learning rate


def get_config(variant: str = "1000") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "vicreg"
    config.batch_size, lr = RECIPES[variant]
    config.epochs = float(variant)
    config.views = barlow_views()
    config.model.update(conv_init="fan_out_normal", bn_unbiased=True)
    config.optim.update(name="lars_byol", lr=lr, weight_decay=1e-6)
    # A thousandth of the peak; `final_lr` isn't scaled by the batch.
    config.optim.final_lr = 1e-3 * lr * config.batch_size / 256
    return config
