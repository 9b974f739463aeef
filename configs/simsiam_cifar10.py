"""SimSiam on CIFAR-10; the variant is the setting: `paper`, `lightly`, `solo` or `cpu`.

Paper: Chen & He, 2020, arXiv:2011.10566, appendix D (the released code has no CIFAR command):
ResNet-18, batch 512, SGD .03·B/256, 800 epochs, a two-layer projector. Published: 91.8 % linear
(paper), kNN 76.4 % (lightly, 200 epochs), 90.5 % online linear (solo-learn). Cost: 3.3 GFLOP per
view. Data: `recipes.cifar10_config`. Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import (
    cifar10_config,
    cpu_cifar10_config,
    lightly_cifar10_config,
    moco_v2_views,
    solo_cifar10_config,
)


def paper() -> ConfigDict:
    """The paper's appendix D."""
    config = cifar10_config()
    config.method = "simsiam"
    config.batch_size = 512
    config.epochs = 800.0
    config.views = moco_v2_views(size=32, blur=False)
    config.model.update(conv_init="torch", bn_unbiased=True)
    config.simsiam.update(layers=2, hidden=2048)
    config.optim.update(name="sgd", lr=0.03, weight_decay=5e-4, decay_norm_bias=True)
    config.optim.update(warmup_epochs=0.0, per_epoch=True)
    return config


def lightly() -> ConfigDict:
    """Lightly's benchmark: no scaling of the learning rate, and the predictor's decays, too."""
    config = lightly_cifar10_config(smallest=0.2)
    config.method = "simsiam"
    config.simsiam.update(layers=2, hidden=2048, out_bn="full", out_bias=False)
    config.simsiam.predictor_constant_lr = False
    config.optim.update(lr=0.06, lr_scaling="none")
    return config


def solo() -> ConfigDict:
    """solo-learn's script."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.4, 0.1))
    config.method = "simsiam"
    config.simsiam.update(hidden=2048)
    config.optim.update(name="sgd", lr=0.5, weight_decay=1e-5, decay_norm_bias=True)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "simsiam"
    config.batch_size = 64
    config.simsiam.update(hidden=256, out=256, predictor_hidden=64)
    config.optim.update(name="sgd", lr=0.1, weight_decay=5e-4)
    return config


def get_config(variant: str = "paper") -> ConfigDict:
    """Returns the config."""
    return {"paper": paper, "lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
