"""SimSiam on scikit-learn's digits, minutes on a CPU.

Paper: Chen & He, 2020, arXiv:2011.10566. Deviations: `recipes.digits_config`; smaller heads.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config(variant: str = "") -> ConfigDict:
    """The run."""
    config = digits_config()
    config.method = "simsiam"
    config.simsiam.update(hidden=256, out=256, predictor_hidden=64)
    config.optim.update(lr=0.1, warmup_epochs=0.0)
    return config
