"""SimSiam on ImageNet, the official recipe.

Paper: Chen & He, 2020, arXiv:2011.10566; facebookresearch/simsiam. ResNet-50, 100 epochs, batch
512, SGD 0.05·B/256, a constant learning rate for the predictor. Published: 68.1 % linear (68.3 at
batch 256). Cost: 49 GFLOP per image. Data: `recipes.imagenet_config`. Deviations: computed in
bfloat16; the blur is an exact Gaussian.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import imagenet_config, moco_v2_views


def get_config() -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "simsiam"
    config.batch_size = 512
    config.views = moco_v2_views()
    config.model.update(conv_init="torch", bn_unbiased=True)
    config.optim.update(
        name="sgd",
        lr=0.05,
        weight_decay=1e-4,
        decay_norm_bias=True,
        warmup_epochs=0.0,
        per_epoch=True,
    )
    return config
