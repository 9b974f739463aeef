"""BYOL on ImageNet, the official recipe; the variant is the epochs: `40`, `100`, `300`, `1000`.

Paper: Grill et al., 2020, arXiv:2006.07733; deepmind-research/byol. ResNet-50, batch 4096, LARS
with the learning rate outside the momentum. Published: 74.3 % linear at 1,000 epochs. Cost: 65
GFLOP per image. Data: `recipes.imagenet_config`. Deviations: computed in bfloat16; every epoch is a
new permutation of the images, without the last partial batch; images are normalized outside the
model.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import byol_views, imagenet_config

RECIPES = {  # epochs -> learning rate, weight decay, initial EMA decay
    "40": (0.45, 1e-6, 0.97),
    "100": (0.45, 1e-6, 0.99),
    "300": (0.3, 1e-6, 0.99),
    "1000": (0.2, 1.5e-6, 0.996),
}


def get_config(variant: str = "1000") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config()
    config.method = "byol"
    config.batch_size = 4096
    config.epochs = float(variant)
    config.count_steps = "images"
    config.views = byol_views()
    config.model.update(padding="same", project_first=True)
    config.model.update(conv_init="haiku", zero_init_residual=False)
    lr, weight_decay, config.byol.ema_decay = RECIPES[variant]
    config.optim.update(name="lars_byol", lr=lr, weight_decay=weight_decay)
    return config
