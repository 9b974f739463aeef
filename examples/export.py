"""Exports a run's encoder and checks the exports: python examples/export.py RUN OUT.

OUT/encoder.safetensors has torchvision's parameter names, OUT/encoder.bin is a program that needs
only JAX. Both reproduce the features of the run.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import ssl_jax
from ssl_jax.config import flat_views
from ssl_jax.interop.export import export_program, export_torch

run, out = sys.argv[1], Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
export_torch(run, out / "encoder.safetensors")
export_program(run, out / "encoder.bin")

encoder = ssl_jax.load(run)
size = flat_views(encoder.config)[0].size
images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
expected = encoder.apply(images)
program = jax.export.deserialize(bytearray((out / "encoder.bin").read_bytes()))
exported = {
    "encoder.safetensors": ssl_jax.load(out / "encoder.safetensors").apply(images),
    "encoder.bin": program.call(images),
}
for name, features in exported.items():
    print(f"{out / name}: features differ by {np.abs(features - expected).max():.1g} at most")
