"""SwAV on ImageNet, the official recipes; the variant is the batch: `4096` or `256`.

Paper: Caron et al., 2020, arXiv:2006.09882; facebookresearch/swav. ResNet-50, 2×224 + 6×96 crops,
3,000 prototypes, SGD with LARC. 4096: 800 epochs; 256: 200 epochs with a queue of 3,840 from epoch
15. Published: 75.3 % linear (4096). Cost: 76 GFLOP per image. Data: `recipes.imagenet_config`. With
batch 4096, BatchNorm is over groups of 8 devices: 512 images on the official 64 devices. On other
numbers, choose --config.model.bn_group_size for the same number of images. Deviations: computed in
bfloat16, officially in mixed float16; the blur is an exact Gaussian, of which Pillow's three box
filters are an approximation.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import imagenet_config, swav_views


def get_config(variant: str = "4096") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config("bilinear")
    config.method = "swav"
    config.batch_size = int(variant)
    config.views = swav_views()
    config.model.update(conv_init="fan_out_normal", zero_init_residual=False)
    config.model.bn_unbiased = True
    config.optim.update(name="larc", lr_scaling="none", weight_decay=1e-6)
    if variant == "256":
        config.epochs = 200.0
        config.swav.update(queue=3840, queue_from_epoch=15.0)
        config.optim.update(lr=0.6, final_lr=0.0006, warmup_epochs=0.0, frozen_steps=5005)
    else:
        config.epochs = 800.0
        config.model.bn_group_size = 8
        config.optim.update(lr=4.8, final_lr=0.0048, frozen_steps=313)
        config.optim.update(warmup_epochs=10.0, warmup_start=0.3, warmup_inclusive=True)
    return config
