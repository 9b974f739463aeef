"""SimCLR v1 on scikit-learn's digits: the road end to end in minutes on a CPU.

Paper: Chen et al., 2020, arXiv:2002.05709, scaled down: a ResNet-18 a quarter as wide with the
CIFAR stem, 8×8 scans, batch 256. Deviations: no colour to distort, so the views are affine crops
with brightness, contrast and noise; no flip, for digits are not symmetric; the last BatchNorm of a
block starts at γ = 1, for with γ = 0 an untrained network of this size sees one corner of the image
only and would make a poor baseline of random features.
"""

from ml_collections import ConfigDict

from ssl_jax.config import default_config, view


def get_config(variant: str = "") -> ConfigDict:
    """The run of `make quickstart`."""
    config = default_config()
    config.batch_size = 256
    config.epochs = 160.0
    config.log_every = 20
    config.data.name = "digits"
    digit = view(
        size=8,
        crop={"sampler": "torchvision", "area": (0.4, 1.0), "interpolation": "bilinear"},
        affine={"degrees": 15.0, "translate": 0.1},
        flip=0.0,
        jitter={"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0},
        gray=0.0,
        blur={"prob": 0.0},
        noise=0.05,
    )
    config.views = {"view1": digit, "view2": digit}
    config.model.update(depth=18, width=0.25, stem="cifar", zero_init_residual=False)
    config.simclr.temperature = 0.2
    config.optim.update(lr=2.0, lr_scaling="linear", weight_decay=1e-6, warmup_epochs=10.0)
    config.eval.update(knn_every_epochs=40.0, knn_k=20, crop_fraction=1.0)
    config.checkpoint.every_epochs = 40.0
    return config
