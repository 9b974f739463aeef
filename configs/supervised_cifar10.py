"""Supervised baseline with all labels on CIFAR-10; the variant is `full` or `cpu`.

ResNet-18 with the CIFAR stem on SimSiam's views, 200 epochs, batch 256, SGD 0.1 with a cosine
schedule: what labels achieve on the same pipeline. No published setting; measured with the
variant `cpu` only (docs/benchmarks.md). Cost: 3.3 GFLOP per view. Data: `recipes.cifar10_config`.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cifar10_config, cpu_cifar10_config, moco_v2_views


def full() -> ConfigDict:
    """The full-size network."""
    config = cifar10_config()
    config.method = "supervised"
    config.epochs = 200.0
    config.views = moco_v2_views(size=32, blur=False)
    config.model.update(conv_init="fan_out_normal", zero_init_residual=False)
    config.optim.update(name="sgd", lr=0.1, weight_decay=5e-4, decay_norm_bias=True)
    config.optim.warmup_epochs = 5.0
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "supervised"
    config.optim.update(name="sgd", lr=0.1, weight_decay=5e-4, decay_norm_bias=True)
    return config


def get_config(variant: str = "full") -> ConfigDict:
    """Returns the config."""
    return {"full": full, "cpu": cpu}[variant]()
