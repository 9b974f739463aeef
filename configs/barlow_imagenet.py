"""Barlow Twins on ImageNet, the official recipe.

Paper: Zbontar et al., 2021, arXiv:2103.03230; facebookresearch/barlowtwins. ResNet-50, 1,000
epochs, batch 2048, a projector of three layers of 8,192, LARS with the learning rate outside the
momentum, 0.2·B/256 for weights and 0.0048·B/256 for biases and BatchNorm. Published: 73.5 %
linear. Cost: 51 GFLOP per image; an accelerator pod. Data: `recipes.imagenet_config`. The official
code's gradient is the true one divided by its number of GPUs, 32 in the paper. The rate for biases
and BatchNorm and the weight decay belong to that gradient, so `loss_scale` is 1/32. Deviations:
computed in bfloat16; every epoch is without the last partial batch; the blur is an exact Gaussian.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import barlow_views, imagenet_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "barlow"
    config.batch_size = 2048
    config.epochs = 1000.0
    config.views = barlow_views()
    config.model.update(conv_init="fan_out_normal", bn_unbiased=True)
    config.barlow.loss_scale = 1 / 32
    config.optim.update(name="lars_byol", lr=0.2, norm_bias_lr=0.0048, weight_decay=1e-6)
    config.optim.final_lr = 0.0016  # a thousandth of the peak at this batch size
    return config
