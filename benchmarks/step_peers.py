"""The peers of `train_step.py`: SimCLR's step in plain Flax and in torch.

Both have the same network (ResNet v1.5, two-layer projector with BatchNorm) and the same NT-Xent,
written without ssl_jax, and a standard optimizer: optax's LARS without masks, and torch's SGD,
which does less work. Neither augments: both receive two uint8 views and divide them by 255.
"""

import argparse
import sys
import time
from typing import Any

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
OUT, TEMPERATURE, RATE, MOMENTUM = 128, 0.1, 0.1, 0.9


def plain_flax_step(depth: int, stem: str, dtype: str, views: Any) -> tuple[Any, Any]:
    """Builds SimCLR with Flax's layers, a dense loss, and optax's LARS without masks.

    Args:
      depth: 18, 34 or 50.
      stem: "imagenet" or "cifar".
      dtype: of the computation.
      views: two arrays, uint8 [n, size, size, 3].

    Returns:
      The jitted step, from (state, views) to (state, loss), its state donated; and the first state.
    """
    import functools

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    conv = functools.partial(nn.Conv, use_bias=False, dtype=dtype)
    norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=dtype)

    class Block(nn.Module):
        filters: int
        strides: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            strides = (self.strides, self.strides)
            if depth >= 50:
                y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
                y = nn.relu(norm()(conv(self.filters, (3, 3), strides)(y)))
                y = conv(4 * self.filters, (1, 1))(y)
            else:
                y = nn.relu(norm()(conv(self.filters, (3, 3), strides)(x)))
                y = conv(self.filters, (3, 3))(y)
            y = norm(scale_init=nn.initializers.zeros)(y)
            if x.shape != y.shape:
                x = norm()(conv(y.shape[-1], (1, 1), strides)(x))
            return nn.relu(x + y)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            if stem == "imagenet":
                x = nn.relu(norm()(conv(64, (7, 7), (2, 2))(x)))
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            else:
                x = nn.relu(norm()(conv(64, (3, 3))(x)))
            for stage, blocks in enumerate(BLOCKS[depth]):
                for i in range(blocks):
                    x = Block(64 * 2**stage, 2 if stage and not i else 1)(x)
            x = x.mean((1, 2)).astype(jnp.float32)
            x = nn.relu(nn.BatchNorm(False)(nn.Dense(x.shape[-1], use_bias=False)(x)))
            return nn.BatchNorm(False, use_bias=False)(nn.Dense(OUT, use_bias=False)(x))

    network = Network()
    optimizer = optax.lars(RATE, 1e-6, momentum=MOMENTUM)

    def loss_of(params: Any, stats: Any, views: Any) -> Any:
        x = jnp.concatenate(views).astype(jnp.float32) / 255
        variables = {"params": params, "batch_stats": stats}
        z, changed = network.apply(variables, x.astype(dtype), mutable=["batch_stats"])
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        n = len(z)
        scores = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, z @ z.T / TEMPERATURE)
        labels = jnp.roll(jnp.arange(n), n // 2)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
        return loss, changed["batch_stats"]

    def step(state: Any, views: Any) -> Any:
        params, stats, opt_state = state
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats, views)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    example = jnp.zeros((2, *views[0].shape[1:]), jnp.float32)
    variables = jax.jit(network.init)(jax.random.key(0), example)
    params, stats = variables["params"], variables["batch_stats"]
    state = (params, stats, optimizer.init(params))
    return jax.jit(step, donate_argnums=0), state


def make_torch_step(args: argparse.Namespace) -> Any:
    """Builds SimCLR with torchvision's network: channels last, bfloat16 autocast, compiled."""
    import torch
    from loss import tolerate_missing_operators
    from torch import nn

    if not torch.cuda.is_available():
        tolerate_missing_operators()
    import torchvision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    encoder = getattr(torchvision.models, f"resnet{args.depth}")(zero_init_residual=True)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if args.stem != "imagenet":
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    projector = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, OUT, bias=False),
        nn.BatchNorm1d(OUT),
    )
    network = nn.Sequential(encoder, projector).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, foreach=True)
    shape = (2 * args.batch, 3, args.size, args.size)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    views = views.to(memory_format=torch.channels_last)
    labels = torch.arange(2 * args.batch, device=device).roll(args.batch)

    def loss_of(views: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            z = network(views.float() / 255)
        z = nn.functional.normalize(z.float())
        scores = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        return nn.functional.cross_entropy(scores, labels)

    if args.compile:
        loss_of = torch.compile(loss_of)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(views)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def serve_torch(args: argparse.Namespace) -> None:
    """For each input line, a number of steps, prints seconds and peak GiB; "ready" first."""
    import torch

    step = make_torch_step(args)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        loss.item()
        return time.perf_counter() - start

    run(args.warmup)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = run(int(line))
        gpu = torch.cuda.is_available()
        print(seconds, torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0, flush=True)


def main() -> None:
    """Runs the torch peer's process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--stem", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=3)
    serve_torch(parser.parse_args())


if __name__ == "__main__":
    main()
