"""SupCon on CIFAR-10; the variant is the setting: `official` or `cpu`.

Paper: Khosla et al., 2020, arXiv:2004.11362; HobbitLong/SupContrast, whose CIFAR-10 results are the
paper's: ResNet-50, batch 1024, SGD 0.5, 1,000 epochs. Published: 96.0 % linear (cross-entropy: 95.0
%, SimCLR: 93.6 %). Cost: 7.8 GFLOP per view. Data: `recipes.cifar10_config`, with labels.
Deviations: computed in bfloat16; the cosine starts after the warmup, not at the run's start, and
moves with every step; BatchNorm over the whole batch; no partial batches. solo-learn's script (93.8
%, ResNet-18) is no variant: it takes the logarithm of the sum over positives, the paper's eq. 3.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cifar10_config, cpu_cifar10_config, supcontrast_views


def official() -> ConfigDict:
    """The command of SupContrast's README."""
    config = cifar10_config()
    config.method = "supcon"
    config.batch_size = 1024
    config.epochs = 1000.0
    config.views = supcontrast_views()
    config.model.update(depth=50, conv_init="fan_out_normal", zero_init_residual=False)
    config.model.bn_unbiased = True
    config.optim.update(name="sgd", lr=0.5, lr_scaling="none", final_lr=5e-4)
    config.optim.update(weight_decay=1e-4, decay_norm_bias=True, warmup_start=0.01)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "supcon"
    return config


def get_config(variant: str = "official") -> ConfigDict:
    """Returns the config."""
    return {"official": official, "cpu": cpu}[variant]()
