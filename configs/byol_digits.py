"""BYOL on scikit-learn's digits, minutes on a CPU.

Paper: Grill et al., 2020, arXiv:2006.07733. Result: 96.7 % at 5 labels per class (raw pixels 86.0,
random init 62.3); full linear 99.8 %. Cost: 8,400 steps of batch 64, 2.6 times the images of
`simclr_digits`. Deviations: `recipes.digits_config`; batch 64 and 400 epochs for more steps,
smaller heads, SGD, a target that starts as a copy of the online network and an EMA decay from 0.98,
for a short run.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "byol"
    config.batch_size = 64
    config.epochs = 400.0
    config.log_every = 80
    config.byol.update(hidden=512, out=64, ema_decay=0.98, target_init="copy")
    config.optim.update(lr=0.1, lr_scaling="none", weight_decay=5e-4, decay_norm_bias=False)
    return config
