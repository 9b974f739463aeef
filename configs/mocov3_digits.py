"""MoCo v3 on scikit-learn's digits, minutes on a CPU.

Paper: Chen, Xie & He, 2021, arXiv:2104.02057. Result: 94.1 % at 5 labels per class (raw pixels
86.0, random init 66.3); full linear 98.4 %. Cost: 800 steps, the images of `simclr_digits` with a
third more computation. Deviations: `recipes.digits_config`; smaller heads, SGD, and a temperature
of 0.2.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "mocov3"
    config.mocov3.update(hidden=512, out=64, temperature=0.2)
    config.optim.update(lr=0.1, weight_decay=5e-4)
    return config
