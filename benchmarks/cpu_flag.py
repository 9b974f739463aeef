"""Compares SimCLR's images/s with and without the flag that `ssl_jax.cli.backend.tune_cpu` sets.

Each measurement is a new process, because XLA reads its flags once. The two variants alternate;
medians and their ratio are printed. The network is a ResNet-18 with the CIFAR stem on 32×32 images.

    python benchmarks/cpu_flag.py [--rounds=3] [--batch=64] [--steps=5] [--width=1.0]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


def measure(batch: int, steps: int, width: float) -> float:
    """Returns the train step's images per second in this process, without the first step."""
    import jax
    import numpy as np

    from ssl_jax.config import default_config, run_schedule, view
    from ssl_jax.data.arrays import ArraySource
    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.spmd import AXIS, make_spmd
    from ssl_jax.step import assemble, init_state, make_train_step

    config = default_config()
    small = view(size=32, blur={"prob": 0.0})
    config.views = {"view1": small, "view2": small}
    config.batch_size = batch
    config.model.update(depth=18, width=width, stem="cifar")
    images = np.random.default_rng(0).integers(0, 256, (4 * batch, 32, 32, 3), np.uint8)
    source = ArraySource(images)
    spmd = make_spmd(batch_size=batch)
    method, optimizer, rate = assemble(config, run_schedule(config, len(images)), AXIS)
    step = spmd.map(
        make_train_step(method, optimizer, make_augment_fn(config), rate),
        ("replicated", "sharded", "replicated"),
        ("replicated", "replicated"),
        donate=(0,),
    )
    state = spmd.replicate(init_state(method, optimizer, config))
    device_data = spmd.replicate(source.device_data())
    ids = spmd.place_batch({"id": np.arange(batch, dtype=np.int32)})
    state, metrics = step(state, ids, device_data)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, ids, device_data)
    jax.block_until_ready(metrics)
    return steps * batch / (time.perf_counter() - start)


def main() -> None:
    """Alternates the two variants and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(measure(args.batch, args.steps, args.width))
        return
    from ssl_jax.cli.backend import tune_cpu

    plain = dict(os.environ, JAX_PLATFORMS="cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"
    tune_cpu()
    kinds = {"without the flag": plain, "with the flag": dict(os.environ)}
    if plain.get("XLA_FLAGS") == os.environ.get("XLA_FLAGS"):
        sys.exit("tune_cpu does nothing here: this jaxlib is not known to have the flag.")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, environment in kinds.items():
            command = [sys.executable, *sys.argv, "--inside"]
            out = subprocess.run(command, env=environment, capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr)
            rates[kind].append(float(out.stdout))
            print(f"{kind}: {rates[kind][-1]:.1f} images/s", flush=True)
    before, after = (statistics.median(rates[kind]) for kind in kinds)
    print(f"medians {before:.1f} and {after:.1f} images/s, ratio {after / before:.2f}")


if __name__ == "__main__":
    main()
