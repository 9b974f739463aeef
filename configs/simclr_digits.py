"""SimCLR v1 on scikit-learn's digits: an end-to-end example, two minutes on two CPU cores.

Paper: Chen et al., 2020, arXiv:2002.05709, scaled down: a ResNet-18 of a quarter of the width with
the CIFAR stem, 8×8 scans, batch 256. Result: 95.1 % at 5 labels per class (raw pixels 86.0 %); full
linear 98.7 %. Deviations: `recipes.digits_config`.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config of `make quickstart`."""
    config = digits_config()
    config.simclr.temperature = 0.2
    config.optim.update(name="lars", lr=2.0, weight_decay=1e-6, decay_norm_bias=False)
    return config
