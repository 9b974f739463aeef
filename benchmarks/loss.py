"""Compares the losses with other implementations: time and memory of value and gradient.

NT-Xent with dense jitted JAX, optax and lightly (in a separate environment); InfoNCE, Sinkhorn,
Barlow Twins and VICReg with dense jitted JAX, the last two also in ssl_jax's form with a d × d
matrix. Implementations alternate, so that a busy machine slows all of them equally.
The table has medians and ratios to ssl_jax. Memory is the compiled program's temporary memory for
JAX, and the growth of the resident set for lightly.

    python benchmarks/loss.py [--peer=lightly --peer-python=PATH] [--sizes=1024,2048,4096,8192]
        [--large=65536] [--info-nce=256x65536,8192x65536] [--sinkhorn=8192x3000]
        [--statistics=2048x8192] [--rounds=5] [--json=FILE]

The peer's environment: torch, lightly, lightly-utils, torchvision, NumPy and Pillow.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import print_table

DIM, TEMPERATURE, EPSILON, ITERATIONS, THREADS = 128, 0.1, 0.05, 3, 2
# Programs that need more than this are not run, but their memory is reported.
MAX_MIB = 8192
COLUMNS = ("loss", "size", "implementation", "seconds", "time / ssl_jax", "MiB")


def two_views(n: int, d: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Returns projections of two views of n images, [n, d], the same in every process."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(n, d)).astype(np.float32)
    return first, first + rng.normal(size=(n, d)).astype(np.float32) / 2


def unit_rows(n: int, seed: int) -> np.ndarray:
    """Returns random unit rows, [n, 128]."""
    x = np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# In the peer's process: no JAX.


def tolerate_missing_operators() -> None:
    """Lets torchvision be imported without its C++ operators, which aren't used here."""
    import torch

    register_fake = torch.library.register_fake

    def tolerant(operator: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        register = register_fake(operator, *args, **kwargs)

        def decorate(function: Any) -> Any:
            try:
                return register(function)
            except RuntimeError:
                return function

        return decorate

    torch.library.register_fake = tolerant


def peak_mib() -> float:
    """Returns the peak resident set; `ru_maxrss` would include the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve_lightly() -> None:
    """For each input line N prints seconds, MiB of growth and the value of lightly's loss."""
    import torch

    tolerate_missing_operators()
    from lightly.loss.ntx_ent_loss import NTXentLoss

    torch.set_num_threads(THREADS)
    loss = NTXentLoss(temperature=TEMPERATURE)

    def measure(n: int) -> tuple[float, float, float]:
        z1, z2 = (torch.tensor(z, requires_grad=True) for z in two_views(n))
        before, start = peak_mib(), time.perf_counter()
        value = loss(z1, z2)
        value.backward()
        return time.perf_counter() - start, peak_mib() - before, value.item()

    measure(64)
    for line in sys.stdin:
        print(*measure(int(line)), flush=True)


class Peer:
    """A process with another interpreter that measures lightly on demand."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve-lightly"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, n: int) -> tuple[float, float, float]:
        """Returns seconds, MiB (meaningful only at the first call) and the loss at batch n."""
        print(n, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if len(answer) != 3:
            sys.exit("The peer's process ended. See its output above.")
        seconds, mib, value = map(float, answer)
        return seconds, mib, value

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


# In this process: JAX.


class Compiled:
    """A jitted function with fixed arguments.

    Attributes:
      mib: the compiled program's temporary memory.
      first: the first of its results at the last run.
    """

    def __init__(self, function: Callable[..., Any], *args: np.ndarray) -> None:
        import jax

        self.block = jax.block_until_ready
        self.args = jax.device_put(args)
        self.program = jax.jit(function).lower(*self.args).compile()
        self.mib = self.program.memory_analysis().temp_size_in_bytes / 2**20

    def seconds(self) -> float:
        """Runs once and returns the seconds."""
        start = time.perf_counter()
        results = self.block(self.program(*self.args))
        seconds = time.perf_counter() - start
        self.first = np.asarray(results[0] if isinstance(results, tuple) else results)
        return seconds


def nt_xent_implementations() -> dict[str, Callable[..., Any]]:
    """ssl_jax, dense JAX and optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from ssl_jax import losses

    def unit(z1: Any, z2: Any) -> Any:
        z = jnp.concatenate([z1, z2])
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    def dense(z1: Any, z2: Any) -> Any:
        z, n = unit(z1, z2), z1.shape[0]
        scores = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, z @ z.T / TEMPERATURE)
        positive = jnp.sum(z[:n] * z[n:], axis=1) / TEMPERATURE
        return jnp.mean(jax.nn.logsumexp(scores, axis=1)) - jnp.mean(positive)

    def optaxs(z1: Any, z2: Any) -> Any:
        return optax.ntxent(unit(z1, z2), jnp.tile(jnp.arange(z1.shape[0]), 2), TEMPERATURE)

    def ours(z1: Any, z2: Any) -> Any:
        return losses.nt_xent(z1, z2, temperature=TEMPERATURE)

    named = {"ssl_jax": ours, "dense JAX": dense, "optax": optaxs}
    return {name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in named.items()}


def info_nce_implementations() -> dict[str, Callable[..., Any]]:
    """ssl_jax and dense JAX."""
    import jax
    import jax.numpy as jnp

    from ssl_jax import losses

    def dense(q: Any, k: Any, queue: Any) -> Any:
        q /= jnp.linalg.norm(q, axis=1, keepdims=True)
        logits = jnp.concatenate([jnp.sum(q * k, axis=1, keepdims=True), q @ queue.T], axis=1)
        return -jnp.mean(jax.nn.log_softmax(logits / TEMPERATURE)[:, 0])

    def ours(q: Any, k: Any, queue: Any) -> Any:
        return losses.info_nce(q, k, queue, temperature=TEMPERATURE)

    return {"ssl_jax": jax.value_and_grad(ours), "dense JAX": jax.value_and_grad(dense)}


def sinkhorn_implementations() -> dict[str, Callable[..., Any]]:
    """ssl_jax and dense JAX, which is safe only where exp(scores / epsilon) is."""
    import jax.numpy as jnp

    from ssl_jax import losses

    def dense(scores: Any) -> Any:
        q = jnp.exp(scores / EPSILON)
        q /= jnp.sum(q)
        for _ in range(ITERATIONS):
            q /= jnp.sum(q, axis=0, keepdims=True) * q.shape[1]
            q /= jnp.sum(q, axis=1, keepdims=True) * q.shape[0]
        return q * q.shape[0]

    def ours(scores: Any) -> Any:
        return losses.sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS)

    return {"ssl_jax": ours, "dense JAX": dense}


def statistics_implementations() -> dict[str, dict[str, Callable[..., Any]]]:
    """By loss: ssl_jax, its form with a d × d matrix, and dense JAX."""
    import jax
    import jax.numpy as jnp

    from ssl_jax import losses

    def off_diagonal(matrix: Any) -> Any:
        return jnp.sum(jnp.square(jnp.where(jnp.eye(len(matrix), dtype=bool), 0, matrix)))

    def dense_barlow(z1: Any, z2: Any) -> Any:
        u, v = (
            (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-5)
            for z in (z1, z2)
        )
        c = u.T @ v / len(u)
        return jnp.sum(jnp.square(jnp.diagonal(c) - 1)) + 0.0051 * off_diagonal(c)

    def dense_vicreg(z1: Any, z2: Any) -> Any:
        loss, (n, d) = 25 * jnp.mean(jnp.square(z1 - z2)), z1.shape
        for z in (z1, z2):
            x = z - z.mean(0, keepdims=True)
            deviation = jnp.sqrt(x.var(0, ddof=1) + 1e-4)
            loss += 12.5 * jnp.mean(jax.nn.relu(1 - deviation))
            loss += off_diagonal(x.T @ x / (n - 1)) / d
        return loss

    def weighted(terms: Any, weights: tuple[float, ...]) -> Any:
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    def barlow(z1: Any, z2: Any, gram: bool | None) -> Any:
        return weighted(losses.barlow_twins(z1, z2, gram=gram), (1, 0.0051))

    def vicreg(z1: Any, z2: Any, gram: bool | None) -> Any:
        return weighted(losses.vicreg(z1, z2, gram=gram), (25, 25, 1))

    def named(ours: Any, dense: Any) -> dict[str, Callable[..., Any]]:
        forms = {"ssl_jax": None, "ssl_jax, d × d": False}
        found = {name: functools.partial(ours, gram=gram) for name, gram in forms.items()}
        return {
            name: jax.value_and_grad(loss, argnums=(0, 1))
            for name, loss in (found | {"dense JAX": dense}).items()
        }

    return {"Barlow Twins": named(barlow, dense_barlow), "VICReg": named(vicreg, dense_vicreg)}


def compare(
    loss: str,
    size: str,
    compiled: dict[str, Compiled],
    rounds: int,
    peer: tuple[str, Callable[[], float], float, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Alternates the implementations, ssl_jax first, and checks that they agree.

    Args:
      loss: its name, for the table.
      size: of the problem, for the table.
      compiled: by implementation.
      rounds: of every implementation once.
      peer: name, what measures its seconds, its MiB and its result.

    Returns:
      A row of the table for each implementation.
    """
    mib = {name: program.mib for name, program in compiled.items()}
    compiled = {name: program for name, program in compiled.items() if program.mib < MAX_MIB}
    runs = {name: program.seconds for name, program in compiled.items()}
    if peer is not None:
        runs[peer[0]], mib[peer[0]] = peer[1:3]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            # After another's turn caches and memory are cold, which counts in a short run.
            first = run()
            seconds[name].append(first if first > 2 else run())
    results = {name: program.first for name, program in compiled.items()}
    if peer is not None:
        results[peer[0]] = peer[3]
    for name, result in results.items():
        if not np.allclose(result, results["ssl_jax"], rtol=1e-3, atol=1e-5):
            sys.exit(f"{loss} at {size}: {name} and ssl_jax disagree.")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "loss": loss,
            "size": size,
            "implementation": name,
            "seconds": medians.get(name),
            "time / ssl_jax": medians[name] / medians["ssl_jax"] if name in medians else None,
            "MiB": mib[name],
        }
        for name in mib
    ]
    for row in rows:
        print(" | ".join(cells(row)), file=sys.stderr, flush=True)
    return rows


def compare_nt_xent(n: int, rounds: int, peer_python: str | None) -> list[dict[str, Any]]:
    """Measures NT-Xent at batch n, with a new peer process so that memory growth is this size's."""
    named = nt_xent_implementations()
    views = two_views(n)
    compiled = {name: Compiled(function, *views) for name, function in named.items()}
    if peer_python is None:
        return compare("NT-Xent", f"{n:,}", compiled, rounds)
    peer = Peer(peer_python)
    _, mib, value = peer.measure(n)
    rows = compare(
        "NT-Xent",
        f"{n:,}",
        compiled,
        rounds,
        ("lightly", lambda: peer.measure(n)[0], mib, np.asarray(value)),
    )
    peer.close()
    return rows


def large_nt_xent(n: int) -> dict[str, Any]:
    """Measures ssl_jax at a batch whose matrix no other implementation could hold."""
    ours = Compiled(nt_xent_implementations()["ssl_jax"], *two_views(n))
    row = {"loss": "NT-Xent", "size": f"{n:,}", "implementation": "ssl_jax"}
    first = ours.seconds()
    seconds = first if first > 2 else ours.seconds()
    return {**row, "seconds": seconds, "time / ssl_jax": 1.0, "MiB": ours.mib}


def cells(row: dict[str, Any]) -> list[str]:
    """Formats a row of the table."""
    names = [row["loss"], row["size"], row["implementation"]]
    if row["seconds"] is None:
        return [*names, "not run", "", f"{row['MiB']:,.0f}"]
    return [*names, f"{row['seconds']:.3g}", f"{row['time / ssl_jax']:.2f}", f"{row['MiB']:,.0f}"]


def shapes(text: str) -> list[tuple[int, int]]:
    """Parses pairs of numbers such as "256x65536,8192x65536"."""
    pairs = [part.split("x") for part in text.split(",") if part]
    return [(int(n), int(k)) for n, k in pairs]


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,2048,4096,8192", help="batches of NT-Xent")
    parser.add_argument("--large", type=int, default=65536, help="batch for ssl_jax only; 0: none")
    parser.add_argument("--info-nce", type=shapes, default="256x65536,8192x65536")
    parser.add_argument("--sinkhorn", type=shapes, default="8192x3000")
    parser.add_argument(
        "--statistics", type=shapes, default="2048x8192", help="images × dimensions"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=["lightly"])
    parser.add_argument("--peer-python", help="interpreter of the peer's environment")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--serve-lightly", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer and not args.peer_python:
        parser.error("--peer needs --peer-python, the interpreter of its environment")
    return args


def main() -> None:
    """Runs the requested comparisons and prints the table."""
    args = parse_arguments()
    if args.serve_lightly:
        serve_lightly()
        return
    peer_python = args.peer_python if args.peer else None
    rows: list[dict[str, Any]] = []
    for n in (int(size) for size in args.sizes.split(",") if size):
        rows += compare_nt_xent(n, args.rounds, peer_python)
    if args.large:
        rows.append(large_nt_xent(args.large))
    for n, k in args.info_nce:
        arrays = (two_views(n)[0], unit_rows(n, 1), unit_rows(k, 2))
        named = info_nce_implementations()
        compiled = {name: Compiled(function, *arrays) for name, function in named.items()}
        rows += compare("InfoNCE", f"{n:,} × {k:,}", compiled, args.rounds)
    for n, k in args.sinkhorn:
        scores = unit_rows(n, 3) @ unit_rows(k, 4).T
        named = sinkhorn_implementations()
        compiled = {name: Compiled(function, scores) for name, function in named.items()}
        rows += compare("Sinkhorn", f"{n:,} × {k:,}", compiled, args.rounds)
    for n, d in args.statistics:
        for loss, named in statistics_implementations().items():
            views = two_views(n, d)
            compiled = {name: Compiled(function, *views) for name, function in named.items()}
            rows += compare(loss, f"{n:,} × {d:,}", compiled, args.rounds)
    print_table(COLUMNS, map(cells, rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
