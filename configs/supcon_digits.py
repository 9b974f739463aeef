"""SupCon on scikit-learn's digits with all labels, minutes on a CPU.

Paper: Khosla et al., 2020, arXiv:2004.11362. Result: 99.3 % with a probe of 5 labels per class (raw
pixels 86.0, random init 66.3); full linear 99.3 %. Its features are trained with all
labels: compare them with `supervised_digits`, not with self-supervised runs. Cost: that of
`simclr_digits`. Deviations: `recipes.digits_config`.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "supcon"
    config.optim.lr = 0.1
    return config
