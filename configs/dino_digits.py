"""DINO on scikit-learn's digits, minutes on a CPU.

Paper: Caron et al., 2021, arXiv:2104.14294. Result: 96.6 % at 5 labels per class by the teacher,
96.2 by the student (raw pixels 86.0, random init 62.3); full linear 99.3 %. Cost: 6,300 steps of
batch 64, 2.0 times the images of `simclr_digits`, and no small crops. Deviations:
`recipes.digits_config`; batch 64 and 300 epochs for more steps; two crops of 8×8; a smaller head
with BatchNorm and 512 prototypes, a constant weight decay, an EMA decay from 0.99 and a teacher's
temperature of 0.02. With 0.04 and a rate of 1e-3 it collapses to the uniform distribution.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import digits_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = digits_config()
    config.method = "dino"
    config.batch_size = 64
    config.epochs = 300.0
    config.log_every = 80
    config.dino.update(hidden=256, out=64, prototypes=512, head_bn=True, ema_decay=0.99)
    config.dino.teacher_temperature = 0.02
    config.optim.update(name="adamw", lr=5e-3, lr_scaling="none", weight_decay=0.05)
    config.optim.update(decay_norm_bias=False, clip_norm_per_tensor=3.0, frozen_steps=21)
    return config
