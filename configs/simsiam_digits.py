"""SimSiam on scikit-learn's digits, minutes on a CPU.

Paper: Chen & He, 2020, arXiv:2011.10566. Result: 83.9 % at 5 labels per class (raw pixels 86.0,
random init 66.3); full linear 94.4 %. Cost: 4 minutes on two cores. Deviations:
`recipes.digits_config`; batch 64 and 200 epochs for more steps, LARS, smaller heads.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "simsiam"
    config.batch_size = 64
    config.epochs = 500.0
    config.log_every = 80
    config.simsiam.update(hidden=256, out=256, predictor_hidden=64)
    config.optim.update(lr=0.3, weight_decay=5e-4)
    return config
