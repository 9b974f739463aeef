"""lightly's side of `benchmarks/curves.py`, which runs this file in lightly's environment.

The methods and settings of lightly's CIFAR-10 benchmark (learning rates for batch 128, scaled
linearly, except SimSiam's), from lightly's own heads, losses, transforms, memory bank and split
BatchNorm. Only the encoder is written here: the narrow ResNet-18 that ssl_jax trains next to it. A
run keeps its state in --out after each epoch, and resumes from there with the same random numbers.

Needs torch, torchvision, lightly, lightly-utils, NumPy and Pillow; no JAX.
"""

import argparse
import copy
import fcntl
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from input_pipeline import tolerate_missing_lightning
from loss import tolerate_missing_operators
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# lightly imports torchvision, whose wheel lacks operators with torch for CPUs.
tolerate_missing_operators()
tolerate_missing_lightning()

from lightly.loss import (  # noqa: E402
    BarlowTwinsLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
)
from lightly.models import utils  # noqa: E402
from lightly.models.batchnorm import get_norm_layer  # noqa: E402
from lightly.models.modules import heads  # noqa: E402
from lightly.transforms import (  # noqa: E402
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    SimCLRTransform,
    SimSiamTransform,
    SwaVTransform,
)
from lightly.transforms.utils import IMAGENET_NORMALIZE  # noqa: E402

SIZE, SPLITS, QUEUE, EMA_DECAY = 32, 8, 4096, 0.99


class Block(nn.Module):
    """A basic block; parameters are named as in torchvision."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = nn.Sequential()
        if stride > 1 or inputs != width:
            shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] to [n, width, h / stride, w / stride]."""
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.downsample(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 without its classifier: torchvision's layers and names, PyTorch's initialization.

    Attributes:
      features: features per image.
    """

    def __init__(self, width: float, splits: int = 0):
        super().__init__()
        norm = functools.partial(get_norm_layer, num_splits=splits)
        base = int(64 * width)
        self.conv1 = nn.Conv2d(3, base, 7, 2, 3, bias=False)
        self.bn1 = norm(base)
        inputs = base
        for stage in range(4):
            filters = base * 2**stage
            first = Block(inputs, filters, 2 if stage else 1, norm)
            setattr(
                self, f"layer{stage + 1}", nn.Sequential(first, Block(filters, filters, 1, norm))
            )
            inputs = filters
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Encodes images [n, 3, h, w] as [n, features]."""
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Method(nn.Module):
    """Base class: an encoder, its optimizer, and an EMA of encoder and projector."""

    splits = 0

    def __init__(self, width: float):
        super().__init__()
        self.backbone = ResNet18(width, self.splits)
        self.features = self.backbone.features

    def copy_to_target(self) -> None:
        """Starts the EMA of encoder and projector as a copy."""
        self.target = copy.deepcopy(nn.ModuleList([self.backbone, self.projector]))
        utils.deactivate_requires_grad(self.target)

    def update_target(self) -> None:
        """Moves the EMA; called before a step, as in lightly's benchmark."""
        utils.update_momentum(
            nn.ModuleList([self.backbone, self.projector]), self.target, EMA_DECAY
        )

    def encode_target(self, x: Tensor) -> Tensor:
        """Projections by the EMA, without gradient."""
        backbone, projector = self.target
        with torch.no_grad():
            return projector(backbone(x))

    def optimizer(self, batch: int) -> torch.optim.Optimizer:
        """SGD with lightly's learning rate for a batch size."""
        return self.sgd(0.06 * batch / 128)

    def sgd(self, lr: float) -> torch.optim.Optimizer:
        """SGD on all trainable parameters."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=5e-4)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss of a batch of two views."""
        raise NotImplementedError


class SimCLR(Method):
    """NT-Xent at temperature 0.5."""

    def __init__(self, width: float):
        super().__init__(width)
        self.projector = heads.SimCLRProjectionHead(self.features, self.features, 128)
        self.criterion = NTXentLoss(temperature=0.5)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss of a batch; views are encoded one after the other."""
        return self.criterion(self.projector(self.backbone(x0)), self.projector(self.backbone(x1)))


class MoCo(Method):
    """InfoNCE in both directions, with one memory bank for both; BatchNorm in eighths."""

    splits = SPLITS

    def __init__(self, width: float):
        super().__init__(width)
        self.projector = heads.MoCoProjectionHead(self.features, self.features, 128)
        self.copy_to_target()
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(QUEUE, 128))

    def one_way(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss of queries from one view against shuffled keys of the other."""
        shuffled, order = utils.batch_shuffle(x1)
        query = self.projector(self.backbone(x0))
        return self.criterion(query, utils.batch_unshuffle(self.encode_target(shuffled), order))

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Half the sum of both directions."""
        self.update_target()
        return (self.one_way(x0, x1) + self.one_way(x1, x0)) / 2


class BYOL(Method):
    """Negative cosine between predictions and the EMA's projections."""

    def __init__(self, width: float):
        super().__init__(width)
        self.projector = heads.BYOLProjectionHead(self.features, 1024, 256)
        self.copy_to_target()
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Half the sum of both directions, in [-1, 1]."""
        self.update_target()
        p0, p1 = (self.predictor(self.projector(self.backbone(x))) for x in (x0, x1))
        z0, z1 = self.encode_target(x0), self.encode_target(x1)
        return (self.criterion(p0, z1) + self.criterion(p1, z0)) / 2


class SimSiam(Method):
    """Negative cosine with a stop-gradient; two layers in the projector."""

    def __init__(self, width: float):
        super().__init__(width)
        hidden = (self.features, 2048, nn.BatchNorm1d(2048), nn.ReLU())
        self.projector = heads.ProjectionHead([hidden, (2048, 2048, nn.BatchNorm1d(2048), None)])
        self.predictor = heads.SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def optimizer(self, batch: int) -> torch.optim.Optimizer:
        """SGD; the learning rate doesn't depend on the batch size."""
        return self.sgd(0.06)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Half the sum of both directions, in [-1, 1]."""
        z0, z1 = (self.projector(self.backbone(x)) for x in (x0, x1))
        p0, p1 = self.predictor(z0), self.predictor(z1)
        return (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach())) / 2


class SwAV(Method):
    """Swapped prediction of 512 prototypes, without a queue or small crops."""

    def __init__(self, width: float):
        super().__init__(width)
        self.projector = heads.SwaVProjectionHead(self.features, 512, 128)
        self.prototypes = heads.SwaVPrototypes(128, 512)
        self.criterion = SwaVLoss()

    def optimizer(self, batch: int) -> torch.optim.Optimizer:
        """Adam with coupled weight decay."""
        lr = 1e-3 * batch / 128
        return torch.optim.Adam(self.parameters(), lr=lr, weight_decay=1e-6)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Normalizes the prototypes; the loss of a batch."""
        self.prototypes.normalize()
        z = [nn.functional.normalize(self.projector(self.backbone(x)), dim=1) for x in (x0, x1)]
        return self.criterion([self.prototypes(each) for each in z], []).squeeze()


class Barlow(Method):
    """Cross-correlation of the batch; two layers in the projector."""

    def __init__(self, width: float):
        super().__init__(width)
        hidden = (self.features, 2048, nn.BatchNorm1d(2048), nn.ReLU())
        self.projector = heads.ProjectionHead([hidden, (2048, 2048, None, None)])
        self.criterion = BarlowTwinsLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.criterion(*(self.projector(self.backbone(x)) for x in (x0, x1)))


METHODS = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL, "simsiam": SimSiam, "swav": SwAV}
METHODS |= {"barlow": Barlow}


def byol_views() -> BYOLTransform:
    """BYOL's and Barlow Twins' transform, without blur."""
    return BYOLTransform(
        BYOLView1Transform(input_size=SIZE, gaussian_blur=0.0),
        BYOLView2Transform(input_size=SIZE, gaussian_blur=0.0),
    )


def simclr_views() -> SimCLRTransform:
    """SimCLR's and MoCo's transform, with half the jitter and no blur."""
    return SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)


def simsiam_views() -> SimSiamTransform:
    """SimSiam's transform, without blur."""
    return SimSiamTransform(input_size=SIZE, gaussian_blur=0.0)


def swav_views() -> SwaVTransform:
    """SwAV's transform: two crops of one size, half the jitter, no blur."""
    crops: dict[str, Any] = {"crop_sizes": (SIZE,), "crop_counts": (2,)}
    crops |= {"crop_min_scales": (0.14,), "crop_max_scales": (1.0,)}
    return SwaVTransform(**crops, cj_strength=0.5, gaussian_blur=0.0)


TRANSFORMS = {"simclr": simclr_views, "moco": simclr_views, "byol": byol_views}
TRANSFORMS |= {"barlow": byol_views, "simsiam": simsiam_views, "swav": swav_views}


class Views(Dataset):
    """Two views of each image, as lightly's transforms make them from Pillow images."""

    def __init__(self, images: np.ndarray, method: str):
        self.images = images
        self.transform = TRANSFORMS[method]()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        """The views of an image."""
        return self.transform(Image.fromarray(self.images[index]))


def encode(backbone: nn.Module, images: np.ndarray) -> np.ndarray:
    """Features of whole images in eval mode, [n, d]."""
    mean, std = (torch.tensor(IMAGENET_NORMALIZE[key])[:, None, None] for key in ("mean", "std"))
    backbone.eval()
    with torch.no_grad():
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(256)
        features = [backbone((batch / 255 - mean) / std) for batch in batches]
    backbone.train()
    return torch.cat(features).numpy()


class Run:
    """A run whose state is saved in a folder after each epoch.

    Attributes:
      lines: a record per finished epoch: "epoch", "loss" (mean over its steps), "seconds" and
        "images" of training.
    """

    def __init__(self, args: argparse.Namespace, images: np.ndarray):
        """Starts from the seed, or from the saved state."""
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)  # solarization and blur, if no other processes make the views
        self.method = METHODS[args.method](args.width)
        self.optimizer = self.method.optimizer(args.batch)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs)
        self.loader = DataLoader(
            Views(images, args.method),
            batch_size=args.batch,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
        )
        self.lines: list[dict[str, float]] = []
        self.file = args.out / "state.pt"
        if self.file.exists():
            self.restore(torch.load(self.file, weights_only=True))

    def banks(self) -> dict[str, Tensor]:
        """The memory bank, which lightly leaves out of a module's state."""
        bank = getattr(self.method.criterion, "memory_bank", None)
        return {} if bank is None else {"bank": bank.bank, "bank_ptr": bank.bank_ptr}

    def save(self) -> None:
        """Replaces the saved state."""
        state = {
            "method": self.method.state_dict(),
            "banks": self.banks(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "numpy_random": numpy_state(),
            "lines": self.lines,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.file)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self.method.load_state_dict(state["method"])
        for name, tensor in self.banks().items():
            tensor.copy_(state["banks"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        set_numpy_state(state["numpy_random"])
        self.lines = state["lines"]

    def epoch(self) -> dict[str, float]:
        """Trains for an epoch and returns its record."""
        losses, images, start = [], 0, time.perf_counter()
        for x0, x1 in self.loader:
            loss = self.method.loss(x0, x1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            images += len(x0)
        self.schedule.step()
        return {
            "epoch": len(self.lines) + 1,
            "loss": float(np.mean(losses)),
            "seconds": time.perf_counter() - start,
            "images": images,
        }

    def train(self, epochs: int) -> Iterator[dict[str, float]]:
        """Trains until an epoch, saving the state after each; yields records."""
        while len(self.lines) < epochs:
            self.lines.append(self.epoch())
            yield self.lines[-1]
            self.save()


def numpy_state() -> tuple[str, Tensor, int, int, float]:
    """The state of NumPy's global generator, of types that `torch.load` takes."""
    name, keys, *rest = np.random.get_state()
    return name, torch.from_numpy(keys.astype(np.int64)), *rest


def set_numpy_state(state: tuple[str, Tensor, int, int, float]) -> None:
    """Restores the state of NumPy's global generator."""
    name, keys, *rest = state
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def write_lines(file: Path, lines: list[dict[str, float]]) -> None:
    """Replaces a file by JSON lines."""
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, file)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--train", type=Path, required=True, help="packed training images")
    parser.add_argument("--test", type=Path, required=True, help="packed test images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--every", type=int, default=3, help="epochs between features for kNN")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--workers", type=int, default=1, help="processes that make views")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, or resumes; writes epochs.jsonl, and features every few epochs."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"Another process trains in {args.out}. Wait for it, or end it.")
        train, test = (np.load(file)["images"] for file in (args.train, args.test))
        run = Run(args, train)
        for line in run.train(args.epochs):
            print(json.dumps(line), file=sys.stderr, flush=True)
            if line["epoch"] % args.every == 0:
                features = {
                    "train": encode(run.method.backbone, train),
                    "test": encode(run.method.backbone, test),
                }
                np.savez(args.out / f"features_{line['epoch']}.npz", **features)
        write_lines(args.out / "epochs.jsonl", run.lines)


if __name__ == "__main__":
    main()
