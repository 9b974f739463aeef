"""Mutation tests: introduces one bug at a time and checks that a test of `make test` fails.

Each mutation below is a plausible bug. It is applied to a copy of the checkout, and its test files
are run there, without the long tests. `make mutations` runs all mutations; with part of a name as
the argument, only those that match.
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
    """One bug.

    Attributes:
      name: describes the bug.
      file: contains `old` exactly once.
      old: the correct code.
      new: the code with the bug.
      tests: test files of which one must fail, and pytest options, separated by spaces.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "EMA weights are swapped",
        "ssl_jax/ema.py",
        "optax.incremental_update(online, target, step_size)",
        "optax.incremental_update(target, online, step_size)",
        "tests/test_ema.py",
    ),
    Mutation(
        "gradients are summed over devices instead of averaged",
        "ssl_jax/step.py",
        "gradients, stats = jax.tree.map(method.mean, (gradients, stats))\n    return",
        "gradients = jax.tree.map(lambda g: jax.lax.psum(g, method.axis_name), gradients)\n"
        "    stats = jax.tree.map(method.mean, stats)\n    return",
        "tests/test_step.py",
    ),
    Mutation(
        "NT-Xent's gradient is divided by the global batch",
        "ssl_jax/losses.py",
        "dz *= cotangents[0] / (2 * n * temperature)",
        "dz *= cotangents[0] / (2 * columns.shape[0] // 2 * temperature)",
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
        "MoCo's queue is filled one batch ahead",
        "ssl_jax/methods/moco.py",
        "start = step % (queue.shape[1] // self.keys_per_step) * self.keys_per_step",
        "start = (step + 1) % (queue.shape[1] // self.keys_per_step) * self.keys_per_step",
        "tests/methods/test_moco.py",
    ),
    Mutation(
        "MoCo's keys are unshuffled in the wrong order",
        "ssl_jax/methods/moco.py",
        "lambda x: all_to_all(x)[jnp.argsort(order)]",
        "lambda x: all_to_all(x)[order]",
        "tests/methods/test_moco.py",
    ),
    Mutation(
        "SwAV's queue keeps the oldest features",
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
        "Barlow Twins' redundancy keeps the diagonal",
        "ssl_jax/losses.py",
        "redundancy = jnp.sum(squares[0]) - jnp.sum(jnp.square(diagonal))",
        "redundancy = jnp.sum(squares[0])",
        "tests/test_losses.py",
    ),
    Mutation(
        "VICReg's variance is divided by N",
        "ssl_jax/losses.py",
        "variance *= n / (n - 1)",
        "variance *= 1",
        "tests/test_losses.py",
    ),
    Mutation(
        "DINO's teacher isn't centered",
        "ssl_jax/loss_kernels.py",
        "(matmul(teacher, teacher_prototypes) - center[None, None, :])",
        "(matmul(teacher, teacher_prototypes) - 0 * center[None, None, :])",
        "tests/test_losses.py",
    ),
    Mutation(
        "an anchor is its own positive",
        "ssl_jax/loss_kernels.py",
        "positive &= own != index[None]",
        "positive &= True",
        "tests/test_losses.py",
    ),
    Mutation(
        "MoCo v3's queries have the keys of their own view",
        "ssl_jax/methods/mocov3.py",
        "for view, other in ((0, 1), (1, 0)):",
        "for view, other in ((0, 0), (1, 1)):",
        "tests/methods",
    ),
    Mutation(
        "gradients are clipped to half the norm",
        "ssl_jax/optim.py",
        "limit / (jnp.linalg.norm(gradient) + 1e-6)",
        "limit / (2 * jnp.linalg.norm(gradient) + 1e-6)",
        "tests/test_optim.py",
    ),
    Mutation(
        "a gradient flows into BYOL's target",
        "ssl_jax/methods/byol.py",
        '"target": jax.lax.stop_gradient(target),',
        '"target": target,',
        "tests/methods/test_regression.py",
    ),
    Mutation(
        "MoCo v3's key is a negative, too",
        "ssl_jax/methods/mocov3.py",
        "candidates, own=own, temperature=tau",
        "candidates, temperature=tau",
        "tests/methods/test_mocov3.py",
    ),
    Mutation(
        "MoCo v3's EMA decay is that of the step before",
        "ssl_jax/methods/mocov3.py",
        "options.ema_decay, step + 1,",
        "options.ema_decay, step,",
        "tests/methods/test_mocov3.py",
    ),
    Mutation(
        "a projection is a positive of itself",
        "ssl_jax/loss_kernels.py",
        "positive &= own != index[None]",
        "positive &= own >= 0",
        "tests/test_losses.py",
    ),
    Mutation(
        "images without a label are a class",
        "ssl_jax/loss_kernels.py",
        "jnp.tile(column_label, 2)[None]) & (label >= 0)",
        "jnp.tile(column_label, 2)[None])",
        "tests/test_losses.py",
    ),
    Mutation(
        "every epoch has the same order",
        "ssl_jax/data/index.py",
        "np.array([seed, epoch], np.uint64)",
        "np.array([seed, 0], np.uint64)",
        "tests/data/test_index.py",
    ),
    Mutation(
        "both views of an image have the same crop",
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
        "only the sizes of a checkpoint's files are compared",
        "ssl_jax/run/checkpoint.py",
        "if _checksum(file) != expected:",
        "if _checksum(file)[:1] != expected[:1]:",
        "tests/run/test_checkpoint.py",
    ),
    Mutation(
        "checksums.json may name files of other folders",
        "ssl_jax/run/checkpoint.py",
        "if not _is_inside(folder, name) or not",
        "if not",
        "tests/run/test_checkpoint.py",
    ),
    Mutation(
        "a label of -1 counts as a class",
        "ssl_jax/data/sources.py",
        "has_label = labels != NO_LABEL",
        "has_label = labels > -2",
        "tests/data/test_sources.py",
    ),
    Mutation(
        "links are followed by what appends to files",
        "ssl_jax/files.py",
        "os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK",
        "os.O_CREAT | os.O_NONBLOCK",
        "tests/test_files.py",
    ),
    Mutation(
        "diagnostics are of the first images",
        "ssl_jax/data/index.py",
        "np.random.default_rng(0).permutation(count)[:most]",
        "np.arange(count)[:most]",
        "tests/evals/test_evaluator.py -k sample",
    ),
    Mutation(
        "SwAV's warmup is one step longer than the official one",
        "ssl_jax/optim.py",
        "max(warmup - config.warmup_inclusive, 1)",
        "max(warmup, 1)",
        "tests/test_configs.py -k official",
    ),
    Mutation(
        "images of the view's size are cropped for evaluation",
        "ssl_jax/data/device_crop.py",
        "    if (height, width) == size:",
        "    if (height, width) == -1:",
        "tests/data/test_views.py",
    ),
    Mutation(
        "the host runs any number of steps ahead",
        "ssl_jax/train/loop.py",
        "jax.block_until_ready(before)",
        "pass",
        "tests/train/test_loop.py -k in_flight",
    ),
    Mutation(
        "a run resumes with a different config",
        "ssl_jax/run/folder.py",
        "    if changed:\n        lengths",
        "    if False:\n        lengths",
        "tests/run/test_run_folder.py tests/train/test_loop.py",
    ),
    Mutation(
        "two processes lock the same folder",
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
        "a non-finite step changes the state",
        "ssl_jax/step.py",
        "jnp.where(finite, new, old)",
        "jnp.where(True, new, old)",
        "tests/run/test_nonfinite.py",
    ),
    Mutation(
        "the second pass over microbatches has different random numbers",
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
        "nearer neighbors have smaller weights",
        "ssl_jax/evals/knn.py",
        "weight = np.exp((similarity - similarity[:, :1]) / temperature)",
        "weight = np.exp((similarity[:, :1] - similarity) / temperature)",
        "tests/evals/test_knn.py",
    ),
    Mutation(
        "the report doesn't escape names",
        "ssl_jax/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "tests/report/test_report.py",
    ),
    Mutation(
        "a file is written in place",
        "ssl_jax/files.py",
        "        yield temporary\n        temporary.chmod(0o666 & ~_umask())\n"
        "        _sync(temporary)\n        os.replace(temporary, file)",
        "        yield file",
        "tests/test_files.py",
    ),
    Mutation(
        "a projected shortcut is exported under a different name",
        "ssl_jax/interop/torch_names.py",
        '"downsample.0"',
        '"downsample.5"',
        "tests/interop/test_import_weights.py",
    ),
    Mutation(
        "a detector divides pixels by the standard deviation of values in [0, 1]",
        "ssl_jax/interop/metadata.py",
        "[round(scale * x, 6) for x in std]",
        "[round(x, 6) for x in std]",
        "tests/interop/test_detectron2.py",
    ),
]


def copy_checkout(folder: Path) -> None:
    """Copies the tracked files, with uncommitted changes."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(tests: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs test files in the copy until one fails; a timeout ends tests that hang."""
    options = ["-x", "-q", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", *options, *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def is_detected(mutation: Mutation, folder: Path) -> bool:
    """Whether a test fails in the copy with the bug, which is then reverted."""
    file = folder / mutation.file
    correct = file.read_text()
    if correct.count(mutation.old) != 1:
        sys.exit(f"{mutation.file} contains {mutation.old!r} {correct.count(mutation.old)} times.")
    file.write_text(correct.replace(mutation.old, mutation.new))
    done = run_tests(mutation.tests, folder)
    file.write_text(correct)
    if done.returncode not in (0, 1):
        sys.exit(f"{mutation.name}: pytest ended with {done.returncode}.\n{done.stdout[-3000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    print(*failed[:1] or [done.stdout[-300:]], sep="\n")
    return done.returncode == 1


def main() -> int:
    """Runs the mutations; returns 1 if any goes undetected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "name", nargs="?", default="", help="run only mutations with this in the name"
    )
    name = parser.parse_args().name
    undetected = []
    chosen = [mutation for mutation in MUTATIONS if name in mutation.name]
    with tempfile.TemporaryDirectory() as temporary:
        copy_checkout(Path(temporary))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{temporary}/compiled")
        for tests in sorted({mutation.tests for mutation in chosen}):
            if run_tests(tests, Path(temporary)).returncode:
                sys.exit(f"{tests} fails without a mutation. Fix it first.")
        for number, mutation in enumerate(chosen, start=1):
            print(f"{number}/{len(chosen)} {mutation.name}: {mutation.tests}", flush=True)
            began = time.monotonic()
            if not is_detected(mutation, Path(temporary)):
                undetected.append(mutation.name)
                print("NOT DETECTED")
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(chosen) - len(undetected)} of {len(chosen)} mutations were detected.")
    return bool(undetected)


if __name__ == "__main__":
    sys.exit(main())
