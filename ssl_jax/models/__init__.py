"""Networks: encoders and heads."""

from ssl_jax.models.heads import MLPHead
from ssl_jax.models.registry import make_encoder, register
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT

__all__ = ["MLPHead", "ResNet", "ViT", "make_encoder", "register"]
