"""Breaks the package on purpose, one place at a time: a test of `make test` must fail each time.

A test suite is only as good as what it notices. Each mutation below is a mistake somebody could
make; its test files, less the long tests, are run in a copy of the checkout that has the mistake.
`make mutations` runs all; a part of a name as the argument runs those that match it.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
      name: what is broken.
      file: of the package, where `old` occurs once.
      old: the right code.
      new: the wrong code.
      tests: files that must notice, space-separated, with options of pytest's.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "EMA in the wrong order",
        "ssl_jax/ema.py",
        "optax.incremental_update(online, target, step_size)",
        "optax.incremental_update(target, online, step_size)",
        "tests/test_ema.py",
    ),
    Mutation(
        "gradients are summed over devices, not averaged",
        "ssl_jax/step.py",
        "gradients, stats = jax.tree.map(method.mean, (gradients, stats))\n    return",
        "gradients = jax.tree.map(lambda g: jax.lax.psum(g, method.axis_name), gradients)\n"
        "    stats = jax.tree.map(method.mean, stats)\n    return",
        "tests/test_step.py",
    ),
    Mutation(
        "NT-Xent's gradient is divided by the global batch",
        "ssl_jax/losses.py",
        "dz *= cotangent / (2 * n * temperature)",
        "dz *= cotangent / (2 * columns.shape[0] // 2 * temperature)",
        "tests/test_losses.py",
    ),
    Mutation(
        "an anchor is its own negative",
        "ssl_jax/loss_kernels.py",
        "return jnp.where(itself, -jnp.inf, scores)",
        "return scores",
        "tests/test_losses.py",
    ),
    Mutation(
        "pairs of blocks are visited twice",
        "ssl_jax/loss_kernels.py",
        "once = (rows[:, None] < columns[None, :])",
        "once = (rows[:, None] != columns[None, :])",
        "tests/test_losses.py",
    ),
    Mutation(
        "Sinkhorn normalizes per device",
        "ssl_jax/losses.py",
        'columns = 1 / _psum(matmul(rows, q, "highest"), axis_name)',
        'columns = 1 / matmul(rows, q, "highest")',
        "tests/test_losses.py",
    ),
    Mutation(
        "a crop predicts itself",
        "ssl_jax/losses.py",
        "others = 1.0 - jnp.eye(assigned, views)",
        "others = jnp.ones((assigned, views))",
        "tests/test_losses.py",
    ),
    Mutation(
        "MoCo's queue is filled one batch too far on",
        "ssl_jax/methods/moco.py",
        "start = step % (options.queue // keys.shape[1]) * keys.shape[1]",
        "start = (step + 1) % (options.queue // keys.shape[1]) * keys.shape[1]",
        "tests/methods/test_moco.py",
    ),
    Mutation(
        "MoCo's keys come back in the wrong order",
        "ssl_jax/methods/moco.py",
        "lambda x: all_to_all(x)[jnp.argsort(order)]",
        "lambda x: all_to_all(x)[order]",
        "tests/methods/test_moco.py",
    ),
    Mutation(
        "SwAV's queue holds the oldest",
        "ssl_jax/methods/swav.py",
        'jnp.concatenate([new, state["queue"]], axis=1)',
        'jnp.concatenate([state["queue"], new], axis=1)',
        "tests/methods/test_swav.py",
    ),
    Mutation(
        "BYOL's views predict themselves",
        "ssl_jax/methods/byol.py",
        "losses.normalized_mse(p[:, 0], z[:, 1])",
        "losses.normalized_mse(p[:, 0], z[:, 0])",
        "tests/methods/test_regression.py",
    ),
    Mutation(
        "a gradient flows into BYOL's target",
        "ssl_jax/methods/byol.py",
        "targets.append(jax.lax.stop_gradient(z))",
        "targets.append(z)",
        "tests/methods/test_regression.py",
    ),
    Mutation(
        "epochs have one order",
        "ssl_jax/data/index.py",
        "np.array([seed, epoch], np.uint64)",
        "np.array([seed, 0], np.uint64)",
        "tests/data/test_index.py",
    ),
    Mutation(
        "both views of an image are cropped alike",
        "ssl_jax/data/index.py",
        "in_axes=(0, None))(example_keys(key, ids), number)",
        "in_axes=(0, None))(example_keys(key, ids), 0)",
        "tests/test_step.py tests/data/test_index.py",
    ),
    Mutation(
        "a process trains on the first rows of every batch",
        "ssl_jax/data/index.py",
        "order[:whole].reshape(-1, index.batch_size)[:, held]",
        "order[:whole].reshape(-1, index.batch_size)[:, held - held[0]]",
        "tests/data/test_index.py",
    ),
    Mutation(
        "LARS decays biases",
        "ssl_jax/optim.py",
        'role == "weight", role_labels(params))',
        'role != "", role_labels(params))',
        "tests/test_optim.py",
    ),
    Mutation(
        "a checkpoint's size alone is compared",
        "ssl_jax/run/checkpoint.py",
        "if found != expected:",
        "if found[:1] != expected[:1]:",
        "tests/run/test_checkpoint.py",
    ),
    Mutation(
        "a run resumes with another config",
        "ssl_jax/run/folder.py",
        "        if changed:\n            hint",
        "        if False:\n            hint",
        "tests/run/test_run_folder.py tests/train/test_loop.py",
    ),
    Mutation(
        "two processes hold one folder",
        "ssl_jax/run/folder.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/run/test_run_folder.py tests/train/test_loop.py",
    ),
    Mutation(
        "the best checkpoint is not kept",
        "ssl_jax/run/checkpoint.py",
        "n=1,\n                    get_metric_fn",
        "n=0,\n                    get_metric_fn",
        "tests/run/test_checkpoint.py",
    ),
    Mutation(
        "a step that isn't finite changes the state",
        "ssl_jax/step.py",
        "jnp.where(finite, new, old)",
        "jnp.where(True, new, old)",
        "tests/run/test_nonfinite.py",
    ),
    Mutation(
        "microbatches see other random numbers in the second pass",
        "ssl_jax/step.py",
        "_, pull = jax.vjp(lambda params: forward(params, index)[0], state.params)",
        "other = (index + 1) % microbatches\n"
        "        _, pull = jax.vjp(lambda params: forward(params, other)[0], state.params)",
        "tests/test_microbatch.py",
    ),
    Mutation(
        "BatchNorm is per device",
        "ssl_jax/models/layers.py",
        "        axis_name=axis_name,\n        axis_index_groups",
        "        axis_name=None,\n        axis_index_groups",
        "tests/models/test_resnet.py",
    ),
    Mutation(
        "a neighbor's vote weighs less the nearer it is",
        "ssl_jax/evals/knn.py",
        "weight = np.exp((similarity - similarity[:, :1]) / temperature)",
        "weight = np.exp((similarity[:, :1] - similarity) / temperature)",
        "tests/evals/test_knn.py",
    ),
    Mutation(
        "the report trusts names to be plain text",
        "ssl_jax/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/report/test_report.py",
    ),
    Mutation(
        "a file is written in place",
        "ssl_jax/files.py",
        "        yield temporary\n        os.replace(temporary, file)",
        "        yield file",
        "tests/test_files.py",
    ),
    Mutation(
        "a projected shortcut has another name in PyTorch",
        "ssl_jax/interop/torch_names.py",
        '"downsample.0"',
        '"downsample.5"',
        "tests/interop/test_import_weights.py",
    ),
]


def copy_checkout(folder: Path) -> None:
    """Copies what git tracks, as it is in the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(tests: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs test files in the copy up to the first that fails; a mistake may make one hang."""
    options = ["-x", "-q", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def is_noticed(mutation: Mutation, folder: Path) -> bool:
    """Whether a test fails in the copy with that mistake, which is taken back after."""
    file = folder / mutation.file
    right = file.read_text()
    if right.count(mutation.old) != 1:
        sys.exit(f"{mutation.file} contains {mutation.old!r} {right.count(mutation.old)} times.")
    file.write_text(right.replace(mutation.old, mutation.new))
    done = run_tests(mutation.tests, folder)
    file.write_text(right)
    if done.returncode not in (0, 1):
        sys.exit(f"{mutation.name}: pytest ended with {done.returncode}.\n{done.stdout[-3000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    print(*failed[:1] or [done.stdout[-300:]], sep="\n")
    return done.returncode == 1


def main() -> int:
    """Runs the mutations; 1 if any is not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="part of the names to run")
    name = parser.parse_args().name
    missed = []
    chosen = [mutation for mutation in MUTATIONS if name in mutation.name]
    with tempfile.TemporaryDirectory() as temporary:
        copy_checkout(Path(temporary))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{temporary}/compiled")
        for tests in sorted({mutation.tests for mutation in chosen}):
            if run_tests(tests, Path(temporary)).returncode:
                sys.exit(f"{tests} fails without a mistake: mend that first.")
        for number, mutation in enumerate(chosen, start=1):
            print(f"{number}/{len(chosen)} {mutation.name}: {mutation.tests}", flush=True)
            began = time.monotonic()
            if not is_noticed(mutation, Path(temporary)):
                missed.append(mutation.name)
                print("NOT NOTICED")
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations fail a test.")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
