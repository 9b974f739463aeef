"""SimSiam on scikit-learn's digits, minutes on a CPU.

Paper: Chen & He, 2020, arXiv:2011.10566. Result: 97.2 % at 5 labels per class (raw pixels 86.0,
random init 66.3); full linear 99.3 %. Cost: 10,500 steps of batch 64, 3.3 times the images of
`simclr_digits`; it learns little in the first 3,000. Deviations: `recipes.digits_config`; batch 64
and 500 epochs for more steps, smaller heads.
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
