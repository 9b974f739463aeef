"""Compares images by their features in PyTorch: python examples/features_in_torch.py HUB IMAGE ...

HUB is a folder from `ssl-jax export --format=folder`. Needs only torch, torchvision, safetensors.
"""

import sys

import torch
from PIL import Image

folder, *files = sys.argv[1:]
sys.path.insert(0, folder)
from torch_encoder import load, preprocess  # noqa: E402

encoder = load(f"{folder}/model.safetensors")
batch = torch.stack([preprocess(Image.open(file), encoder) for file in files])
with torch.no_grad():
    features = torch.nn.functional.normalize(encoder(batch))
print("Cosine similarities:")
for file, row in zip(files, features @ features.T, strict=True):
    print(f"  {file}  {' '.join(f'{value:.3f}' for value in row.tolist())}")
