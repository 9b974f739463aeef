"""SimCLR v2 on ImageNet; the variant is the network: `r50`, `r50sk`, `r152w3sk`.

Paper: Chen et al., 2020, arXiv:2006.10029; google-research/simclr. 800 epochs, batch 4096, LARS
0.1·√B, warmup 5 %, a three-layer projector. Published: R50 71.7 %, R152-3×+SK 79.8 % linear. Cost:
49 GFLOP per image for R50. Data: `recipes.imagenet_config`. Deviations: as in `simclr_imagenet.py`;
no memory bank, which the paper has and the official code doesn't (`config.simclr.memory_bank`).
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import SIMCLR_MODEL, imagenet_config, simclr_views

NETWORKS = {
    "r50": {"depth": 50},
    "r50sk": {"depth": 50, "sk": True},
    "r152w3sk": {"depth": 152, "width": 3.0, "sk": True},
}


def get_config(variant: str = "r50") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config()
    config.batch_size = 4096
    config.epochs = 800.0
    config.count_steps = "images_plus_1"
    config.views = simclr_views()
    config.model.update({**SIMCLR_MODEL, **NETWORKS[variant]})
    config.simclr.update(layers=3, loss_scale=2.0)
    config.optim.update(lr=0.1, lr_scaling="sqrt", weight_decay=1e-4, warmup_epochs=40.0)
    return config
