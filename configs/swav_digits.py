"""SwAV on scikit-learn's digits, minutes on a CPU.

Paper: Caron et al., 2020, arXiv:2006.09882. Deviations: `recipes.digits_config`; 64 prototypes, two
crops of 8×8 and two of 6×6, SGD without LARC.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config, digits_view


def get_config(variant: str = "") -> ConfigDict:
    """The run."""
    config = digits_config()
    config.method = "swav"
    small = {"sampler": "torchvision", "area": (0.3, 0.6), "interpolation": "bilinear"}
    config.views = {
        "large": digits_view(count=2),
        "small": digits_view(size=6, count=2, crop=small),
    }
    config.swav.update(prototypes=64, hidden=256, out=64)
    config.optim.update(lr=0.2, frozen_steps=50)
    return config
