"""MoCo on ImageNet, the official recipe; the variant is `v1` or `v2`.

Papers: He et al., 2019, arXiv:1911.05722; Chen et al., 2020, arXiv:2003.04297; code
facebookresearch/moco. ResNet-50, 200 epochs, batch 256 on 8 devices with per-device BatchNorm, SGD
0.03. Published: 60.6 % (v1), 67.5 % (v2) linear. Cost: 33 GFLOP per image. Data:
`recipes.imagenet_config`. Deviations: computed in bfloat16; the blur is an exact Gaussian; Pillow
approximates it by box filters.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import imagenet_config, moco_v1_views, moco_v2_views


def get_config(variant: str = "v2") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "moco"
    config.epochs = 200.0
    config.views = {"v1": moco_v1_views, "v2": moco_v2_views}[variant]()
    config.model.update(conv_init="fan_out_normal", zero_init_residual=False, bn_group_size=1)
    config.model.bn_unbiased = True
    config.optim.update(
        name="sgd",
        lr=0.03,
        weight_decay=1e-4,
        decay_norm_bias=True,
        warmup_epochs=0.0,
        per_epoch=True,
    )
    if variant == "v1":
        config.moco.update(temperature=0.07, layers=1)
        config.optim.update(schedule="step", step_epochs=(120.0, 160.0))
    return config
