"""Starts several real processes that form one run; JAX joins them as under Slurm."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEVICES = 2  # per process
STARTED = []

# Records the ids that each process reads, and makes one process slow once, during training.
CONFIG = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import method_config, tiny_config, without_color

def get_config(variant=""):
    if "IDS" in os.environ:
        from ssl_jax.data.host import HostSource
        from ssl_jax.data.pipeline import Prefetcher
        batches = HostSource.batches
        process, asked = os.environ.get("SLURM_PROCID", "0"), []

        def counted(self, next=Prefetcher.next):
            asked.append(self)
            return next(self)

        Prefetcher.next = counted

        def logged(self, steps):
            for number, batch in enumerate(batches(self, steps)):
                with open(os.environ["IDS"] + process, "a") as file:
                    file.write(" ".join(map(str, batch["id"])) + "\\n")
                if number == 7 and process == os.environ.get("SLOW"):
                    while len(asked) < 8:
                        time.sleep(0.01)
                    time.sleep(4)
                yield batch

        HostSource.batches = logged
    return without_color(method_config(variant) if variant else tiny_config())
"""


END = "is the exit code."
# JAX's transport (Gloo) writes fragments to standard output from several threads, which would break
# up Python's lines. Python's output therefore gets its own file descriptor.
_APART = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
"""
PRETRAIN = f"""
import runpy
runpy.run_path({str(ROOT / "run_pretrain.py")!r}, run_name="__main__")
"""
# Runs commands of `ssl-jax` for `in_turn`, with the tests' ResNet of depth 4 registered.
_IN_TURN = f"""
import json
sys.path.insert(0, {str(ROOT / "tests")!r})
import tiny
from ssl_jax.run import folder
from ssl_jax.cli.main import main
# On one machine another process's lock is visible at once.
folder.lock_text.__defaults__ = (1.0,)
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    for out in (sys.stdout, sys.stderr):
        print(f"{{code}} {END}", file=out, flush=True)
sys.exit(code)
"""


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count, arguments, only=None, program=PRETRAIN, **variables):
    """Starts `count` processes of a program, given as code, with piped output.

    `only` maps the number of a process to additional arguments.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={DEVICES}")
    environment = os.environ | {"XLA_FLAGS": flags} | variables
    if count > 1:
        environment |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"}
        environment |= {"SLURM_NTASKS": str(count), "JAX_COORDINATOR_PORT": str(port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _APART + program, *arguments, *(only or {}).get(i, [])],
            env=environment | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    STARTED.extend(processes)
    return processes


def end_all():
    """Kills processes left by a failed test; SIGTERM would only request a stop."""
    while STARTED:
        STARTED.pop().kill()


def finish(processes, seconds=240):
    """Waits for processes; returns (exit code, standard output, standard error) of each."""
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, out, error)
        for process, (out, error) in zip(processes, ended, strict=True)
    ]


def in_turn(count, commands, seconds=600, **variables):
    """Runs commands of `ssl-jax` one after another in the same processes.

    Args:
      count: number of processes.
      commands: a list of commands, each a list of arguments per process.
      seconds: after which the processes are killed.
      **variables: environment variables, in addition to the tests' own.

    Returns:
      For each command, (exit code, standard output, standard error) of each process.
    """
    only = {i: [json.dumps([list(map(str, c[i])) for c in commands])] for i in range(count)}
    found = []
    for code, *outputs in finish(start(count, [], only, _IN_TURN, **variables), seconds):
        # Each stream alternates a command's output and its exit code.
        parts = [re.split(f"(\\d+) {END}\n", text) for text in outputs]
        assert [len(each) for each in parts] == [2 * len(commands) + 1] * 2, (code, *outputs)
        codes = [int(each) for each in parts[0][1::2]]
        assert codes[-1] == code
        out, error = ([*each[:-3:2], each[-3] + each[-1]] for each in parts)
        found.append(list(zip(codes, out, error, strict=True)))
    return list(zip(*found, strict=True))


def wait_for(process, start, seconds=200):
    """Reads a process's output up to a line with the given start."""
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            if line.startswith(start):
                return
    finally:
        limit.cancel()
    raise AssertionError(f"{start!r} never came: {process.communicate()[1]}")
