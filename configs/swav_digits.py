"""SwAV on scikit-learn's digits, minutes on a CPU.

Paper: Caron et al., 2020, arXiv:2006.09882. Result: 94.3 % at 5 labels per class (raw pixels 86.0,
random init 62.3); full linear 97.6 %. Cost: 3,360 steps of batch 64. Deviations:
`recipes.digits_config`; batch 64 for more steps; two crops of 8×8 and two of 6×6 that show at least
40 % of the scan; LARS instead of LARC; 128 prototypes in 16 dimensions and epsilon 0.03. With as
many dimensions as prototypes, embeddings collapse to a direction equally far from all prototypes;
with assignments hardly sharper than the predictions, they escape from it slowly.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config, digits_view


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "swav"
    config.batch_size = 64
    config.log_every = 80
    small = {"sampler": "torchvision", "area": (0.4, 0.8), "interpolation": "bilinear"}
    config.views = {
        "large": digits_view(count=2),
        "small": digits_view(size=6, count=2, crop=small),
    }
    config.swav.update(prototypes=128, hidden=256, out=16, epsilon=0.03)
    config.optim.update(name="lars", lr=2.0, weight_decay=1e-6, decay_norm_bias=False)
    config.optim.frozen_steps = 100
    return config
