"""Trains with lightly 1.6.0 and with ssl_jax from the same weights and views, in float64.

`python lightly_steps.py METHOD ...` prints one line of JSON per method: the largest relative
differences over ten steps of `configs/METHOD_cifar10.py:lightly` on the first two stages of a
narrow ResNet. The lightly half follows its CIFAR-10 benchmark, with its own networks, losses and
EMA, and torch's optimizers. VICReg isn't in that benchmark: it has Barlow Twins' settings there.
MoCo v3 and SupCon, which lightly doesn't have, are written from the papers here, on lightly's
networks and with the optimizer of its benchmark.
"""

import copy
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# ssl_jax casts statistics and losses to float32. Over ten steps of a network with BatchNorm its
# rounding grows beyond what is compared here, so these casts become casts to float64.
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from loss import tolerate_missing_operators  # noqa: E402

tolerate_missing_operators()
import torch  # noqa: E402
from lightly.loss import (  # noqa: E402
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models import ResNetGenerator, utils  # noqa: E402
from lightly.models.modules import heads  # noqa: E402
from torch import nn  # noqa: E402

from ssl_jax.config import Schedule, load_config  # noqa: E402
from ssl_jax.data.index import stream_key  # noqa: E402
from ssl_jax.interop.torch_names import from_torch, sequential  # noqa: E402
from ssl_jax.models.resnet import STAGES  # noqa: E402
from ssl_jax.spmd import AXIS, make_spmd  # noqa: E402
from ssl_jax.step import assemble, init_state, make_train_step  # noqa: E402

STEPS, PER_EPOCH, BATCH, SIDE, SMALL_SIDE, WIDTH = 10, 2, 32, 8, 6, 1 / 8
FEATURES, HIDDEN, OUT, SPLITS, QUEUE, PROTOTYPES = 16, 24, 16, 8, 128, 24
WIDE = 40  # more than images in a batch
# Of lightly's resnet-9, without the last two stages: compiling takes most of the time.
STAGES[6] = (1, 1)
SMALL = {
    "simclr": {"simclr.hidden": FEATURES, "simclr.out": OUT},
    "moco": {"moco.hidden": FEATURES, "moco.out": OUT, "moco.queue": QUEUE},
    "byol": {"byol.hidden": HIDDEN, "byol.out": OUT},
    "simsiam": {"simsiam.hidden": HIDDEN, "simsiam.out": HIDDEN, "simsiam.predictor_hidden": OUT},
    "swav": {"swav.hidden": FEATURES, "swav.out": OUT, "swav.prototypes": PROTOTYPES},
    "dino": {"dino.hidden": HIDDEN, "dino.out": OUT, "dino.prototypes": PROTOTYPES},
    "mocov3": {"mocov3.hidden": HIDDEN, "mocov3.out": OUT, "mocov3.temperature": 0.2},
    "supcon": {"supcon.hidden": FEATURES, "supcon.out": OUT},
    "barlow": {"barlow.hidden": HIDDEN, "barlow.out": WIDE},
    "vicreg": {"method": "vicreg", "vicreg.hidden": HIDDEN, "vicreg.out": WIDE}
    | {"vicreg.hidden_bias": False, "vicreg.out_bias": True},
}
# The official recipe on the tiny network, with lightly's head and loss and torch's AdamW; its
# schedules are shorter.
SMALL["dino_official"] = SMALL["dino"] | {
    **{"model.name": "resnet", "model.stem": "cifar_no_relu", "model.conv_init": "torch"},
    **{"model.bn_unbiased": True},
    **{"optim.frozen_steps": PER_EPOCH, "optim.warmup_epochs": 1.0, "optim.lr": 0.02},
    **{"optim.clip_norm_per_tensor": 0.05, "dino.norm_last_layer": False},
    **{"dino.teacher_temperature": 0.07, "dino.teacher_temperature_epochs": 3},
}
OFFICIAL_RATE, CLIP = 0.02 * BATCH / 256, 0.05
FROM_PAPERS = ("mocov3", "supcon")
LABELS = np.arange(BATCH) % 5 - 1  # -1: none


class Lightly:
    """The benchmark's model of a method: its networks by ssl_jax's names, and a training step."""

    def __init__(self, method):
        torch.set_default_dtype(torch.float32)  # of the weights, which ssl_jax copies to float32
        splits = SPLITS if method == "moco" else 0
        resnet = ResNetGenerator("resnet-9", width=WIDTH, num_splits=splits)
        backbone = nn.Sequential(*list(resnet.children())[:4], nn.AdaptiveAvgPool2d(1))
        self.networks = {"encoder": backbone, "projector": self.projector(method)}
        self.target = {}
        self.method, self.official, self.number = method, method == "dino_official", 0
        if method.startswith("dino"):  # whose layer with weight norm can't be copied
            self.target = {"encoder": copy.deepcopy(backbone), "projector": self.projector(method)}
            if self.official:
                student = self.networks["projector"].state_dict()
                self.target["projector"].load_state_dict(student)
            else:  # a head of its own, which moves before the first step
                self.move_target()
        if method in ("moco", "byol", "mocov3"):
            self.target = {name: copy.deepcopy(net) for name, net in self.networks.items()}
        if method == "byol":
            self.networks["predictor"] = heads.BYOLPredictionHead(OUT, HIDDEN, OUT)
        if method == "mocov3":
            self.networks["predictor"] = heads.ProjectionHead(
                [
                    (OUT, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU()),
                    (HIDDEN, OUT, None, None, False),
                ]
            )
        if method == "simsiam":
            self.networks["predictor"] = heads.SimSiamPredictionHead(HIDDEN, OUT, HIDDEN)
        if method == "swav":
            self.networks["prototypes"] = heads.SwaVPrototypes(OUT, PROTOTYPES)
        if method.startswith("dino"):  # whose temperatures have the default dtype
            torch.set_default_dtype(torch.float64)
        self.criterion = {
            "simclr": NTXentLoss,
            "moco": lambda: NTXentLoss(temperature=0.1, memory_bank_size=(QUEUE, OUT)),
            "byol": NegativeCosineSimilarity,
            "simsiam": NegativeCosineSimilarity,
            "swav": SwaVLoss,
            "barlow": BarlowTwinsLoss,
            "vicreg": VICRegLoss,
            "dino": lambda: DINOLoss(PROTOTYPES),
            "dino_official": lambda: DINOLoss(PROTOTYPES, 0.04, 0.07, 3),
        }.get(method, nn.Identity)()
        for module in (*self.networks.values(), *self.target.values(), self.criterion):
            module.double().train()
        self.loss = self.dino if self.official else getattr(self, method)
        parameters = [p for net in self.networks.values() for p in net.parameters()]
        self.parameters = [p for p in parameters if p.requires_grad]
        rate = 0.06 if method == "simsiam" else 0.06 * BATCH / 128
        if method == "swav":
            rate = 1e-3 * BATCH / 128
            self.optimizer = torch.optim.Adam(self.parameters, lr=rate, weight_decay=1e-6)
        elif self.official:
            groups = [[p for p in self.parameters if (p.ndim > 1) == decayed] for decayed in (1, 0)]
            decays = [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(decays, lr=0.0)
        else:
            self.optimizer = torch.optim.SGD(
                self.parameters, lr=rate, momentum=0.9, weight_decay=5e-4
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, STEPS // PER_EPOCH
        )

    @staticmethod
    def projector(method):
        if method == "simsiam":
            return heads.ProjectionHead(
                [
                    (FEATURES, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU()),
                    (HIDDEN, HIDDEN, nn.BatchNorm1d(HIDDEN), None),
                ]
            )
        if method.startswith("dino"):
            batch_norm = method == "dino"
            head = heads.DINOProjectionHead(
                FEATURES, HIDDEN, OUT, PROTOTYPES, batch_norm, norm_last_layer=batch_norm
            )
            if batch_norm:  # as the benchmark
                hidden = (FEATURES, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.GELU())
                head.layers = heads.ProjectionHead([hidden, (HIDDEN, OUT, None, None)]).layers
            return head
        if method == "mocov3":
            return heads.ProjectionHead(
                [
                    (FEATURES, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU()),
                    (HIDDEN, OUT, nn.BatchNorm1d(OUT, affine=False), None),
                ]
            )
        if method == "barlow":
            hidden = (FEATURES, HIDDEN, nn.BatchNorm1d(HIDDEN), nn.ReLU())
            return heads.ProjectionHead([hidden, (HIDDEN, WIDE, None, None)])
        if method == "vicreg":
            return heads.VICRegProjectionHead(FEATURES, HIDDEN, WIDE)
        kind, hidden = {
            "simclr": (heads.SimCLRProjectionHead, FEATURES),
            "moco": (heads.MoCoProjectionHead, FEATURES),
            "byol": (heads.BYOLProjectionHead, HIDDEN),
            "swav": (heads.SwaVProjectionHead, FEATURES),
            "supcon": (heads.MoCoProjectionHead, FEATURES),
        }[method]
        return kind(FEATURES, hidden, OUT)

    def project(self, images, networks=None):
        networks = networks or self.networks
        return networks["projector"](networks["encoder"](images).flatten(start_dim=1))

    def move_target(self, decay=0.99):
        if self.method == "mocov3":  # a cosine to 1, by the step's place in the run
            decay = 1 - 0.01 * (1 + np.cos(np.pi * self.number / STEPS)) / 2
        for name, network in self.target.items():
            utils.update_momentum(self.networks[name], network, decay)

    def simclr(self, views, shuffles):
        return self.criterion(*map(self.project, views))

    barlow = vicreg = simclr

    def moco(self, views, shuffles):
        self.move_target()
        losses = []
        for query, key, order in zip(views, views[::-1], shuffles, strict=True):
            q = self.project(query)
            with torch.no_grad():
                k = utils.batch_unshuffle(self.project(key[order], self.target), order)
            losses.append(self.criterion(q, k))
        return sum(losses) / 2

    def byol(self, views, shuffles):
        self.move_target()
        predictions, targets = [], []
        for images in views:
            predictions.append(self.networks["predictor"](self.project(images)))
            with torch.no_grad():
                targets.append(self.project(images, self.target))
        (p0, p1), (z0, z1) = predictions, targets
        return (self.criterion(p0, z1) + self.criterion(p1, z0)) / 2

    def mocov3(self, views, shuffles):
        tau, losses = 0.2, []
        queries = [self.networks["predictor"](self.project(images)) for images in views]
        self.move_target()
        with torch.no_grad():
            keys = [self.project(images, self.target) for images in views]
        for q, k in zip(queries, keys[::-1], strict=True):
            logits = nn.functional.normalize(q) @ nn.functional.normalize(k).T / tau
            losses.append(nn.functional.cross_entropy(logits, torch.arange(BATCH)))
        return 2 * tau * sum(losses)

    def supcon(self, views, shuffles):
        tau, z = 0.1, nn.functional.normalize(self.project(torch.cat(views)))
        label = torch.tensor(np.tile(LABELS, 2))
        itself = torch.eye(2 * BATCH, dtype=torch.bool)
        positive = (label[:, None] == label) & (label >= 0) | itself.roll(BATCH, 0)
        positive &= ~itself
        scores = (z @ z.T / tau).masked_fill(itself, -torch.inf)
        log_p = (scores - scores.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
        return -tau / 0.07 * (log_p.sum(1) / positive.sum(1)).mean()

    def simsiam(self, views, shuffles):
        z0, z1 = map(self.project, views)
        p0, p1 = map(self.networks["predictor"], (z0, z1))
        return (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0)) / 2

    def swav(self, views, shuffles):
        prototypes = self.networks["prototypes"]
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(self.project(x), dim=1)) for x in views]
        return self.criterion(scores, [])

    def dino(self, views, shuffles):
        decay, epoch = 0.99, 0
        if self.official:  # the decay after the step before this one, as the official code's end
            decay, epoch = 1 - (1 - 0.996) * fallen(self.number - 1), self.number // PER_EPOCH
        if self.number:
            self.move_target(decay)
        if not self.official:
            with torch.no_grad():
                targets = [self.project(x, self.target) for x in views]
            return self.criterion(targets, [self.project(x) for x in views], epoch=epoch)
        features = [
            self.networks["encoder"](torch.cat(crops)).flatten(start_dim=1)
            for crops in (views[:2], views[2:])
        ]
        students = self.networks["projector"](torch.cat(features)).chunk(len(views))
        with torch.no_grad():
            both = self.target["encoder"](torch.cat(views[:2])).flatten(start_dim=1)
            targets = self.target["projector"](both).chunk(2)
        return self.criterion(list(targets), list(students), epoch=epoch)

    def step(self, number, views, shuffles):
        """Takes one optimizer step; returns loss, gradient norm and learning rate."""
        self.number = number
        if self.official:
            self.set_schedules(number)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        loss = self.loss(views, shuffles)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.parameters]))
        if self.official:
            for p in self.parameters:
                p.grad *= min(1.0, CLIP / (p.grad.norm().item() + 1e-6))
            self.networks["projector"].freeze_last_layer = 1
            self.networks["projector"].cancel_last_layer_gradients(number // PER_EPOCH)
        self.optimizer.step()
        if (number + 1) % PER_EPOCH == 0 and not self.official:
            self.schedule.step()
        return loss.item(), norm.item(), rate

    def set_schedules(self, number):
        """A warmup of an epoch that ends at the peak, then a cosine; the decay's own cosine."""
        after = number - PER_EPOCH
        rate = number / (PER_EPOCH - 1) * OFFICIAL_RATE
        if after >= 0:
            rate = 1e-6 + (OFFICIAL_RATE - 1e-6) * fallen(after, STEPS - PER_EPOCH)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.param_groups[0]["weight_decay"] = 0.4 + (0.04 - 0.4) * fallen(number)

    def trees(self, networks):
        """The networks' parameters and running statistics as ssl_jax has them."""
        params, stats = {}, {}
        for name, network in networks.items():
            if hasattr(network, "last_layer"):
                last = network.last_layer
                params["prototypes"] = {
                    "kernel": last.weight_v.detach().numpy().T,
                    "length": last.weight_g.detach().numpy()[:, 0],
                }
            if name == "prototypes":
                (linear,) = network.heads
                weight = nn.functional.normalize(linear.weight.detach(), dim=1)
                params[name] = {"kernel": weight.numpy().T, "bias": linear.bias.detach().numpy()}
            else:
                params[name], stats[name] = network_trees(name, network)
        return params, stats


def network_trees(name, network):
    """Converts an encoder or a head to ssl_jax's trees."""
    state = network.state_dict().items()
    state = {key: value.numpy() for key, value in state if not key.startswith("last_layer.")}
    if name == "encoder":
        names = sequential(state)
        state = {names[key]: value for key, value in state.items()}
        params, stats, unknown = from_torch(state, split=True)
    else:
        kinds = {nn.Linear: "dense", nn.BatchNorm1d: "bn"}
        layers, number = {}, 0
        for position, layer in enumerate(network.layers):
            if type(layer) in kinds:
                number += type(layer) is nn.Linear
                layers[f"layers.{position}"] = f"{kinds[type(layer)]}{number}"

        def place(key):
            layer, _, leaf = key.rpartition(".")
            return layers[layer], leaf

        params, stats, unknown = from_torch(state, place)
    assert not unknown, unknown
    return params, stats


def fallen(step, total=STEPS):
    """A cosine from 1 to 0."""
    return (1 + np.cos(np.pi * step / total)) / 2


class Ours:
    """ssl_jax's train step on one device."""

    def __init__(self, method, lightly):
        changes = [f"{key}={value}" for key, value in SMALL[method].items()]
        changes += [
            f"batch_size={BATCH}",
            f"model.width={WIDTH}",
            "model.depth=6",
            "eval.probe=False",
        ]
        changes += ["max_nonfinite_steps=0", f"epochs={STEPS // PER_EPOCH}"]
        official = method == "dino_official"
        file = {"vicreg": "barlow", **dict.fromkeys(FROM_PAPERS, "simclr")}.get(method, method)
        file = "dino_imagenet.py:vit_small" if official else f"{file}_cifar10.py:lightly"
        changes += [f"method={method}"] * (method in FROM_PAPERS)
        config = load_config(str(ROOT / "configs" / file), changes)
        config.dtype = "float64"
        for view in config.views.values():
            view.size = SIDE
        if official:
            config.views.small.update(count=2, size=SMALL_SIDE)
        if method == "moco":
            assert config.model.bn_splits == SPLITS
        self.spmd = make_spmd(devices=jax.devices()[:1])
        schedule = Schedule(PER_EPOCH, STEPS)
        self.method, optimizer, rate = assemble(config, schedule, AXIS)
        step = make_train_step(self.method, optimizer, lambda raw, *_: raw, rate)
        inputs, outputs = ("replicated", "sharded", "replicated"), ("replicated", "replicated")
        self.step_fn = self.spmd.map(step, inputs, outputs)
        params, stats = lightly.trees(lightly.networks)
        method_state = {"batch_stats": stats}
        if lightly.target:
            method_state["target"], stats["target"] = lightly.trees(lightly.target)
        if method.startswith("dino"):
            method_state["center"] = lightly.criterion.center.numpy().reshape(-1)
        if method == "moco":
            method_state["queue"] = lightly.criterion.memory_bank.bank.numpy()[None]
        shapes = jax.eval_shape(lambda: init_state(self.method, optimizer, config))
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        params, method_state = jax.tree.map(
            loaded,
            (state.params, state.method_state),
            (params, method_state),
        )
        state = state.replace(
            params=params,
            method_state=method_state,
            opt_state=jax.device_get(optimizer.init(params)),
            key=np.asarray(jax.random.key_data(jax.random.key(0))),
        )
        self.state = self.spmd.replicate(jax.tree.map(with_long_integers, state))

    def step(self, views):
        ids = np.arange(BATCH, dtype=np.int32)
        batch = {"id": ids, "label": LABELS.astype(np.int32), "views": tuple(views)}
        batch = self.spmd.place_batch(batch)
        self.state, metrics = self.step_fn(self.state, batch, {})
        return [float(metrics[name]) for name in ("loss", "gradient_norm", "learning_rate")]

    def shuffles(self, number):
        """The order in which MoCo encodes the key images of each direction."""
        if not hasattr(self.method, "shuffle"):
            return [None, None]
        rng = stream_key(jax.random.wrap_key_data(self.state.key), "forward", number)
        mapped = self.spmd.map(
            lambda x: [self.method.shuffle(x, jax.random.fold_in(rng, i))[0] for i in (0, 1)],
            ("sharded",),
            "sharded",
        )
        return [np.asarray(order).astype(int) for order in mapped(np.arange(BATCH, dtype=float))]


def loaded(own, new):
    """Checks the shape of a weight and converts it to float64."""
    assert own.shape == new.shape
    return np.asarray(new, own.dtype)


def with_long_integers(x):
    """Converts step counts: in JAX, int32 divided by a Python number is float32, int64 float64.

    And the float32 numbers that were computed from them, such as the first step's weight decay.
    """
    long = {np.dtype(np.int32): np.int64, np.dtype(np.float32): np.float64}
    return x.astype(long.get(x.dtype, x.dtype))


def relative(actual, expected):
    """The largest difference of two trees, relative to the largest value of each leaf.

    A leaf may be 0 but for rounding, as SimSiam's shift before the predictor's BatchNorm.
    """

    def difference(a, b):
        return float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-9))

    return max(jax.tree.leaves(jax.tree.map(difference, actual, expected)))


def compare(method):
    """Trains both; returns the largest relative differences."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lightly = Lightly(method)
    ours = Ours(method, lightly)
    # A split is a block of images in ssl_jax, every SPLITS-th image in lightly.
    order = np.arange(BATCH)
    if method == "moco":
        order = order.reshape(SPLITS, -1).T.reshape(-1)
    place = np.argsort(order)
    steps = []
    for number in range(STEPS):
        image = rng.normal(size=(BATCH, SIDE, SIDE, 3))
        views = [image + rng.normal(size=image.shape) for _ in range(2)]
        if lightly.official:
            small = image[:, :SMALL_SIDE, :SMALL_SIDE]
            views += [small + rng.normal(size=small.shape) for _ in range(2)]
        shuffles = [
            None if each is None else torch.tensor(place[each[order]])
            for each in ours.shuffles(number)
        ]
        theirs = [torch.tensor(view[order].transpose(0, 3, 1, 2)).contiguous() for view in views]
        steps.append((ours.step(views), lightly.step(number, theirs, shuffles)))
    # ssl_jax does so at the end of a step.
    lightly.number = STEPS
    lightly.move_target(*([1 - (1 - 0.996) * fallen(STEPS - 1)] if lightly.official else []))
    mine, peer = (np.array(each).T for each in zip(*steps, strict=True))
    if method == "byol":
        mine[0] -= 1  # 1 - cos against -cos
    names = ("loss", "gradient norm", "learning rate")
    found = {name: relative(a, b) for name, a, b in zip(names, mine, peer, strict=True)}
    params, stats = lightly.trees(lightly.networks)
    state = jax.device_get(ours.state)
    method_state = state.method_state
    if lightly.target:
        target, stats["target"] = lightly.trees(lightly.target)
        found["target"] = relative(method_state["target"], target)
    found["parameters"] = relative(state.params, params)
    with_stats = {name: tree for name, tree in stats.items() if tree}
    own = {name: method_state["batch_stats"][name] for name in with_stats}
    found["statistics"] = relative(own, with_stats)
    if method.startswith("dino"):
        center = lightly.criterion.center.numpy().reshape(-1)
        found["center"] = relative(method_state["center"], center)
    if method == "moco":
        bank = lightly.criterion.memory_bank.bank.numpy().reshape(-1, BATCH, OUT)
        found["queue"] = relative(method_state["queue"][0].reshape(bank.shape), bank[:, place])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps({"method": name, **compare(name)}), flush=True)
