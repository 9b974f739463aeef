"""Long runs of small steps: memory, open files, threads and functions do not grow."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from images import noise_files

from ssl_jax.run.log import read_metrics

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
CONFIG = f"""
import atexit, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config, without_color

def functions():
    from tensorflow.python.ops import script_ops
    print("Python functions in TensorFlow:", script_ops._py_funcs.size())

def get_config(variant=""):
    config = without_color(tiny_config(batch_size=16, log_every=20))
    config.optim.lr = 0.1
    config.eval.knn_every_epochs = 5.0
    config.checkpoint.every_epochs = 2.5
    if variant:
        config.data.update(name="folder", dir=variant, test_dir=variant)
        config.eval.batch_size = 8
        config.checkpoint.every_epochs = 25.0  # of 4 steps; each leaves some 0.1 MB in Orbax
        atexit.register(functions)
    return config
"""


def measured(pid):
    """Counts resident bytes, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    files, threads = (len(os.listdir(process / name)) for name in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


# On digits, a leak of 4 kB a step would be 24 MB. On a folder, a pipeline per batch of an
# evaluation, of which there are 17 per 20 steps, would be 10 to 80 MB.
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to measure by")
@pytest.mark.parametrize(("data", "total", "limit"), [("", 10_000, 24e6), ("images", 2_000, 8e6)])
def test_memory_files_threads_and_functions_stay_flat(tmp_path, data, total, limit):
    file, workdir, seen = tmp_path / "config.py", tmp_path / "run", []
    file.write_text(CONFIG)
    variant = ""
    if data:
        pytest.importorskip("tensorflow", reason="images on disk are read by TensorFlow")
        (tmp_path / data).mkdir()
        variant = str(noise_files(tmp_path / data))
    line = [sys.executable, str(ROOT / "run_pretrain.py"), f"--config={file}:{variant}"]
    line += [f"--workdir={workdir}", f"--config.steps={total}"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out)
        log = workdir / "metrics.jsonl"
        while process.poll() is None:
            records = read_metrics(log)
            if records and records[-1]["step"] < total:
                try:
                    seen.append((records[-1]["step"], *measured(process.pid)))
                except OSError:  # the process has ended
                    break
            time.sleep(0.3)
        assert process.wait(600) == 0, (tmp_path / "out").read_text()
    steps, memory, files, threads = np.array(seen, np.int64).T
    # The first evaluations and checkpoints compile programs and open files that stay.
    early = (steps > 0.2 * total) & (steps < 0.4 * total)
    late = steps > 0.8 * total
    assert early.sum() >= 5 and late.sum() >= 5
    growth = np.median(memory[late]) - np.median(memory[early])
    print(f"memory {np.median(memory[early]) / 2**20:.0f} MiB, growth {growth / 2**20:.1f} MiB")
    assert growth < limit
    # Writing a checkpoint opens some more.
    assert np.median(files[late]) <= np.median(files[early]) + 2
    assert files[late].max() <= files[early].max() + 5
    assert threads[late].max() <= threads[early].max() + 5
    if data:  # four per source, kind of result and batch size
        (functions,) = re.findall(r"functions in TensorFlow: (\d+)", (tmp_path / "out").read_text())
        assert int(functions) < 40
