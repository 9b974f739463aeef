"""SimCLR v1 on ImageNet, the official recipe; the variant is the batch, such as `8192`.

Paper: Chen et al., 2020, arXiv:2002.05709; google-research/simclr. ResNet-50, 1,000 epochs, batch
4096, LARS 0.3·B/256, weight decay 1e-6. Published: 69.1 % linear. Cost: 49 GFLOP per image, 1.3e9
images; an accelerator pod. Data: TFDS, folders or records, see `recipes.imagenet_config`. The loss
is twice the paper's, as in the official code, and so are the max-pool's padding and the number of
steps. Deviations: computed in bfloat16; the blur's sigma is sampled per image, not per replica
batch; every epoch is a new permutation of the images, without the last partial batch. torchvision
doesn't have this padding: to load the weights there, train with --config.model.padding=symmetric.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import SIMCLR_MODEL, imagenet_config, simclr_views


def get_config(variant: str = "4096") -> ConfigDict:
    """Returns the config."""
    config = imagenet_config()
    config.batch_size = int(variant)
    config.epochs = 1000.0
    config.count_steps = "images_plus_1"
    config.views = simclr_views()
    config.model.update(SIMCLR_MODEL)
    config.simclr.loss_scale = 2.0
    return config
