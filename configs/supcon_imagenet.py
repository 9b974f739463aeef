"""SupCon on ImageNet, the settings of the paper's TensorFlow code.

Paper: Khosla et al., 2020, arXiv:2004.11362; google-research/google-research/supcon. ResNet-50, 350
epochs, batch 6144, LARS 0.4·B/256, temperature 0.1, by which the loss is multiplied. Published:
78.7 % with a linear classifier (ResNet-200: 81.4 %). Cost: 49 GFLOP per image. Data:
`recipes.imagenet_config`, with labels. Deviations: computed in bfloat16; SimCLR's views, as there
is no AutoAugment; a projector of two layers, as in the paper, on features that are not normalized;
biases and BatchNorm's parameters are not decayed.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import imagenet_config, simclr_views


def get_config() -> ConfigDict:
    """Returns the config."""
    config = imagenet_config()
    config.method = "supcon"
    config.batch_size = 6144
    config.epochs = 350.0
    config.views = simclr_views()
    config.supcon.base_temperature = 1.0
    config.optim.update(lr=0.4, weight_decay=1e-3, warmup_epochs=12.0)
    return config
