"""Features of pictures in PyTorch: python examples/features_in_torch.py HUB PICTURE ...

HUB is a folder of `ssl-jax export --format=folder`; torch, torchvision and safetensors are all that
is needed.
"""

import sys

import torch
from PIL import Image

folder, *pictures = sys.argv[1:]
sys.path.insert(0, folder)
from torch_encoder import load, preprocess  # noqa: E402

encoder = load(f"{folder}/model.safetensors")
batch = torch.stack([preprocess(Image.open(picture), encoder) for picture in pictures])
with torch.no_grad():
    features = torch.nn.functional.normalize(encoder(batch))
print("Cosine similarities:")
for picture, row in zip(pictures, features @ features.T, strict=True):
    print(f"  {picture}  {' '.join(f'{value:.3f}' for value in row.tolist())}")
