"""Supervised cross-entropy on scikit-learn's digits with all labels, minutes on a CPU.

The baseline with all labels, on the same pipeline, views and network as the self-supervised runs.
Result: 98.4 % with a probe of 5 labels per class on its features; full linear 99.3 %. Cost:
300 steps of batch 256.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "supervised"
    config.epochs = 60.0
    config.optim.lr = 0.1
    return config
