"""MoCo v3 on ImageNet, official; the variant is `100`, `300`, `1000`, `vit_s` or `vit_b`.

Paper: Chen, Xie & He, 2021, arXiv:2104.02057; code facebookresearch/moco-v3. Batch 4096. The
numbers are the epochs of a ResNet-50 with BYOL's LARS; `vit_s` and `vit_b` are ViTs with patch 16,
of 12 heads each, trained with AdamW for 300 epochs; their patch projection stays random. Published:
68.9, 72.8 and 74.6 % linear (ResNet-50), 73.2 % (ViT-S), 76.7 % (ViT-B). Cost: 65 GFLOP per image
(ResNet-50), 74 (ViT-S), 281 (ViT-B). Data: `recipes.imagenet_config`. Deviations: computed in
bfloat16; the blur is an exact Gaussian, which Pillow approximates by box filters; positions have
the column first, not the row.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import imagenet_config, mocov3_views

RECIPES = {  # epochs -> learning rate, weight decay, initial EMA decay
    "100": (0.6, 1e-6, 0.99),
    "300": (0.3, 1e-6, 0.99),
    "1000": (0.3, 1.5e-6, 0.996),
}
WIDTHS = {"vit_s": 384, "vit_b": 768}


def get_config(variant: str = "1000") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "mocov3"
    config.batch_size = 4096
    config.model.bn_unbiased = True
    if variant in WIDTHS:
        config.epochs = 300.0
        config.views = mocov3_views(smallest=0.08)
        config.model.name = "vit"
        config.model.vit.update(width=WIDTHS[variant], heads=12)
        config.model.vit.update(positions="sincos", weight_init="xavier")
        config.mocov3.update(layers=3, predictor_bn=True, temperature=0.2)
        config.optim.update(name="adamw", lr=1.5e-4, weight_decay=0.1, decay_norm_bias=True)
        config.optim.warmup_epochs = 40.0
        return config
    lr, weight_decay, config.mocov3.ema_decay = RECIPES[variant]
    config.epochs = float(variant)
    config.views = mocov3_views()
    config.model.conv_init = "fan_out_normal"
    config.optim.update(name="lars_byol", lr=lr, weight_decay=weight_decay)
    return config
