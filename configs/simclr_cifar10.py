"""SimCLR on CIFAR-10; the variant is the setting: `official`, `lightly`, `solo` or `cpu`.

Paper: Chen et al., 2020, arXiv:2002.05709, appendix B.9; google-research/simclr's CIFAR command:
ResNet-18, batch 512, LARS 1.0·B/256, the three-layer projector, 1,000 epochs. Published: about 91 %
linear (official), kNN 84.8 % (lightly, 200 epochs), 90.7 % online linear (solo-learn). Cost: 3.3
GFLOP per view. Data: `recipes.cifar10_config`. Deviations: computed in bfloat16; in `official`,
every epoch is a new permutation of the images, without the last partial batch.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import (
    SIMCLR_MODEL,
    cifar10_config,
    cpu_cifar10_config,
    lightly_cifar10_config,
    simclr_views,
    solo_cifar10_config,
)


def official() -> ConfigDict:
    """The official code's CIFAR command."""
    config = cifar10_config()
    config.batch_size = 512
    config.epochs = 1000.0
    config.count_steps = "images_plus_1"
    config.model.update(SIMCLR_MODEL)
    config.views = simclr_views(size=32, strength=0.5, blur=False)
    config.simclr.update(layers=3, temperature=0.5, loss_scale=2.0)
    config.optim.update(lr=1.0, weight_decay=1e-4)
    return config


def lightly() -> ConfigDict:
    """Lightly's benchmark."""
    config = lightly_cifar10_config()
    config.simclr.update(temperature=0.5, head_bn="full", separate_views=True)
    return config


def solo() -> ConfigDict:
    """solo-learn's script."""
    config = solo_cifar10_config(jitter=(0.8, 0.8, 0.8, 0.2))
    config.simclr.update(temperature=0.2, hidden=2048, out=256)
    config.simclr.update(head_bn="none", separate_views=True)
    config.optim.update(lr=0.4, weight_decay=1e-4)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.simclr.temperature = 0.2
    return config


def get_config(variant: str = "official") -> ConfigDict:
    """Returns the config."""
    return {"official": official, "lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
