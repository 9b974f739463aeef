"""Encoders from and for elsewhere: torchvision and timm, the official codes, JAX alone."""
