"""A long run of small steps: memory, open files and threads do not grow."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ssl_jax.run.log import read_metrics

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
STEPS = 10_000
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config, without_color

def get_config(variant=""):
    config = without_color(tiny_config(batch_size=16, steps={STEPS}, log_every=20))
    config.optim.lr = 0.1
    config.eval.knn_every_epochs = 5.0
    config.checkpoint.every_epochs = 2.5
    return config
"""


def measured(pid):
    """Counts resident bytes, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    files, threads = (len(os.listdir(process / name)) for name in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to measure by")
def test_memory_files_and_threads_stay_flat_over_ten_thousand_steps(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    workdir, seen = tmp_path / "run", []
    line = [sys.executable, str(ROOT / "run_pretrain.py"), f"--config={tmp_path / 'config.py'}"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([*line, f"--workdir={workdir}"], stdout=out, stderr=out)
        log = workdir / "metrics.jsonl"
        while process.poll() is None:
            records = read_metrics(log)
            if records and records[-1]["step"] < STEPS:
                try:
                    seen.append((records[-1]["step"], *measured(process.pid)))
                except OSError:  # the process has ended
                    break
            time.sleep(0.1)
        assert process.wait(600) == 0, (tmp_path / "out").read_text()
    steps, memory, files, threads = np.array(seen, np.int64).T
    # The first evaluations and checkpoints compile programs and open files that stay.
    early = (steps > 0.2 * STEPS) & (steps < 0.4 * STEPS)
    late = steps > 0.8 * STEPS
    assert early.sum() >= 5 and late.sum() >= 5
    growth = np.median(memory[late]) - np.median(memory[early])
    print(f"memory {np.median(memory[early]) / 2**20:.0f} MiB, growth {growth / 2**20:.1f} MiB")
    # A leak of 4 kB a step would be 24 MB here.
    assert growth < 24e6
    # Writing a checkpoint opens some more.
    assert np.median(files[late]) <= np.median(files[early]) + 2
    assert files[late].max() <= files[early].max() + 5
    assert threads[late].max() <= threads[early].max() + 5
