"""Measures the host memory per process of a run, by the number of processes.

The same run, with the same global batch of image files, in 1, 2 and 4 processes on this machine.
Peak resident memory per process includes device memory, because the devices are CPUs here.

    python benchmarks/processes.py --images=DIR [--counts=1,2,4] [--batch=64] [--size=224]
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = """
from ssl_jax.config import default_config
from ssl_jax.recipes import simclr_views

def get_config(variant=""):
    config = default_config()
    config.views = simclr_views(size={size}, blur=False)
    config.model.update(depth=18, width=0.25)
    config.data.update(name="folder", dir={images!r}, threads=1)
    config.eval.knn_every_epochs = 0.0
    config.batch_size, config.steps, config.log_every = {batch}, {steps}, 1
    return config
"""


def start(count: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Starts processes that find each other as under Slurm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # one device each
    common["JAX_COMPILATION_CACHE_DIR"] = ""  # compiling takes memory, too
    common |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"}
    common |= {"SLURM_NTASKS": str(count), "JAX_COORDINATOR_PORT": str(port)}
    command = [sys.executable, str(ROOT / "run_pretrain.py"), *arguments]
    return [
        subprocess.Popen(
            command,
            env=common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.DEVNULL,
        )
        for i in range(count)
    ]


def peaks(count: int, arguments: list[str]) -> list[float]:
    """Returns the peak resident MiB of each process of a run."""
    measured = []
    for process in start(count, arguments):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"a process ended with code {process.returncode}")
        measured.append(usage.ru_maxrss / 1024)
    return measured


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of image files")
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    print("| processes | batch of each | peak MiB of each |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.py"
        options = {"size": args.size, "images": args.images, "batch": args.batch}
        config.write_text(CONFIG.format(**options, steps=args.steps))
        for count in map(int, args.counts.split(",")):
            arguments = [f"--config={config}", f"--workdir={folder}/{count}"]
            measured = ", ".join(f"{peak:,.0f}" for peak in peaks(count, arguments))
            print(f"| {count} | {args.batch // count} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
