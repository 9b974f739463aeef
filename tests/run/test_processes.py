"""Runs of several real processes on this machine, with two devices each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from encoders import copy_run
from images import noise_files
from processes import CONFIG, end_all, finish, in_turn, start, wait_for
from tiny import leaves, method_config, tiny_config, without_color

from ssl_jax.data.index import Index, fixed_sample
from ssl_jax.errors import UserError
from ssl_jax.interop.load import restore_state
from ssl_jax.run import processes
from ssl_jax.run.checkpoint import Checkpoints
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain

FOLDER = {"data.name": "folder", "batch_size": 32, "epochs": 6, "checkpoint.every_epochs": 1.5}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_files(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def on_images(config_file, images):
    """Arguments of SimCLR on the files: 12 steps, a checkpoint every 3."""
    options = FOLDER | {"data.dir": images, "data.test_dir": images}
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    return [f"--config={config_file}", "--config.heartbeat_timeout_s=10", *overrides]


def pair_of(arguments, workdir, *more, second=()):
    """Starts a run of two processes, the second with slow storage, then more commands.

    Args:
      arguments: of the run.
      workdir: of the run.
      *more: commands, a pair each.
      second: more arguments of the second process.

    Returns:
      The results of `in_turn`.
    """
    brief = ["--config.eval.at_end=True", "--config.eval.labels_per_class=()"]
    run = ["pretrain", *arguments, *brief, f"--workdir={workdir}"]
    return in_turn(2, [(run, [*run, *second]), *more], IDS=str(workdir / "ids"), SLOW="1")


@pytest.fixture(scope="module")
def ended(on_images, images, tmp_path_factory):
    """Results of commands of two processes, by name; a result per process.

    The second process reads a copy of the images, as from a disk of its own.

    The commands share their processes, as starting these takes longer than several commands.
    """
    root = tmp_path_factory.mktemp("ended")
    workdir = root / "run"
    workdir.mkdir()
    copy = shutil.copytree(images, root / "copy")

    def pretraining(name, *changes):
        return ["pretrain", *on_images, f"--workdir={root / name}", *changes]

    from_run = [f"--config.init_from.path={workdir}", "--config.epochs=0.5"]
    more = {
        "started from a run": (pretraining("e", *from_run), pretraining("e", *from_run)),
        "another config": (pretraining("a"), pretraining("a", "--config.optim.lr=0.5")),
        "not shared": (pretraining("b"), pretraining("c")),
        "no images": (pretraining("d"), pretraining("d", "--config.data.dir=/nowhere")),
    }
    own = [f"--config.data.{key}={copy}" for key in ("dir", "test_dir")]
    results = pair_of(on_images, workdir, *more.values(), second=own)
    return root, dict(zip(["whole run", *more], results, strict=True))


@pytest.fixture(scope="module")
def pair(ended):
    """The complete run's folder and results."""
    root, results = ended
    return root / "run", results["whole run"]


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory):
    """A run on digits, and the results of kNN and fine-tuning by two processes.

    As the first commands of their processes, they have to join them.
    """
    run = copy_run(finished_run, tmp_path_factory.mktemp("evaluated") / "run")
    neighbors = ["knn", f"--from={run}"]
    # A learning rate of 0 keeps the run's encoder.
    brief = ["--config.steps=1", "--config.batch_size=32", "--config.optim.lr=0"]
    fine_tuning = ["finetune", f"--from={run}", "--labels=0.5", *brief]
    return run, in_turn(2, [(neighbors, neighbors), (fine_tuning, fine_tuning)])


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    end_all()


def losses_of(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.long
def test_two_processes_match_one_process(pair, images, tmp_path):
    workdir, (first, second) = pair
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    config = without_color(tiny_config())
    config.update_from_flattened_dict(FOLDER | {"data.dir": str(images)})
    config.update(epochs=6.0, data={"test_dir": str(images)})
    config.eval.update(at_end=True, labels_per_class=())
    pretrain(config, tmp_path / "single")
    together, single = losses_of(workdir), losses_of(tmp_path / "single")
    assert sorted(together) == list(range(1, 13)) and together.keys() == single.keys()
    np.testing.assert_allclose(list(together.values()), list(single.values()), rtol=1e-4)
    measured = [
        [row["knn"] for row in json.loads((path / "evaluation.json").read_text())["rows"]]
        for path in (workdir, tmp_path / "single")
    ]
    np.testing.assert_allclose(*measured, atol=0.05)


@pytest.mark.long
def test_each_sample_is_read_by_a_single_process(pair):
    workdir, _ = pair
    shares = [
        [[int(id) for id in line.split()] for line in (workdir / f"ids{i}").read_text().split("\n")]
        for i in (0, 1)
    ]
    assert shares[0].pop(0) == fixed_sample(64, 12).tolist()  # for the views picture
    index = Index(64, 32, 0)
    for step in range(12):
        # The first half of a batch lies on the devices of the first process.
        np.testing.assert_array_equal(shares[0][step] + shares[1][step], index.ids(step))


@pytest.mark.long
def test_only_the_primary_process_writes_and_prints(pair):
    workdir, (first, second) = pair
    assert "2 processes" in first[1] and "step 12/12" in first[1] and "Report:" in first[1]
    assert second[1] == ""
    logged = [r["step"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    assert logged == list(range(1, 13))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    assert checkpoints.latest_step == 12 and 9 in checkpoints.steps
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert int(restore_state(workdir).step) == 12


@pytest.mark.long
def test_slow_disk_of_one_process_is_reported(pair):
    records = read_metrics(pair[0] / "metrics.jsonl")
    shares = np.array([r["process_data_wait"] for r in records if "process_data_wait" in r])
    seconds = np.array([r["process_step_s"] for r in records if "process_step_s" in r])
    assert shares.shape == seconds.shape == (11, 2)
    waited = shares * seconds
    slow = waited[:, 1].argmax()
    assert waited[slow, 1] > 3.9 and waited[slow, 1] > 2 * waited[slow, 0]
    assert "(process 1: " in pair[1][0][1]


@pytest.mark.long
def test_lost_process_ends_the_others_and_resume_is_bit_exact(on_images, tmp_path):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    undisturbed.mkdir()
    (whole,) = pair_of(on_images, undisturbed)
    assert [code for code, *_ in whole] == [0, 0], whole
    arguments = [*on_images, f"--workdir={workdir}"]
    processes = start(2, arguments)
    wait_for(processes[0], "step 7/")
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    survivor, killed = finish(processes)
    # config.heartbeat_timeout_s is 10, but the machine may be busy; JAX's default is 100.
    assert time.monotonic() - began < 60
    assert killed[0] == -signal.SIGKILL and survivor[0] not in (0, None)
    # Reported by ssl_jax, or by JAX's service if that notices first.
    words = ("another process may be lost", "distributed service detected fatal error")
    assert any(each in survivor[2] for each in words) and "Traceback" not in survivor[2]
    again = finish(start(2, arguments))
    assert [code for code, *_ in again] == [0, 0], again
    assert "Resuming from step" in again[0][1]
    whole, continued = leaves(restore_state(undisturbed)), leaves(restore_state(workdir))
    assert whole.keys() == continued.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], continued[name], err_msg=name)
    assert losses_of(undisturbed) == losses_of(workdir)


@pytest.mark.long
def test_sigterm_to_any_process_stops_all_and_resume_changes_their_number(config_file, tmp_path):
    """MoCo with its queue: four processes, one, and four again match a run of one process."""
    # Long enough for JAX's service, which polls for signals once a second.
    options = {"epochs": 2, "model.bn_group_size": 0, "moco.queue": 128, "data.num_classes": 10}
    options |= {"eval.at_end": True}
    overrides = [f"--config.{key}={value}" for key, value in options.items()]
    arguments = [f"--config={config_file}:moco", *overrides, f"--workdir={tmp_path}"]
    steps = []
    for count, signaled in ((4, 2), (1, 0)):
        processes = start(count, arguments)
        wait_for(processes[0], f"step {2 + (steps or [0])[-1]}/")
        processes[signaled].send_signal(signal.SIGTERM)
        ended = finish(processes)
        assert [code for code, *_ in ended] == [0] * count, ended
        assert "rerun the same command to resume" in ended[0][1]
        assert [out for _, out, _ in ended[1:]] == [""] * (count - 1)
        steps.append(int(restore_state(tmp_path).step))
        assert f"Stopped by SIGTERM at step {steps[-1]} of 42" in ended[0][1]
        assert not (tmp_path / "evaluation.json").exists()
    assert 2 <= steps[0] < steps[1] < 42
    ended = finish(start(4, arguments))
    assert [code for code, *_ in ended] == [0] * 4, ended
    assert (tmp_path / "evaluation.json").exists()
    config = without_color(method_config("moco"))
    config.update_from_flattened_dict(options)
    pretrain(config, tmp_path / "single")
    together, single = losses_of(tmp_path), losses_of(tmp_path / "single")
    assert list(together) == list(single) == list(range(1, 43))
    np.testing.assert_allclose(list(together.values()), list(single.values()), rtol=1e-3)


@pytest.mark.long
def test_two_processes_fine_tune_a_run(evaluated):
    source, (_, (first, second)) = evaluated
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "fine-tuned on 50 % of the images, from step 2, " in first[1] and second[1] == ""
    found = json.loads((source / "evals" / "finetune_0.5.json").read_text())
    assert found["metrics"]["examples"] == 450
    tuned, original = restore_state(source / "finetune_0.5"), restore_state(source)
    for a, b in zip(
        jax.tree.leaves(tuned.params["encoder"]),
        jax.tree.leaves(original.params["encoder"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_evaluating_a_run_in_two_processes_is_refused(evaluated):
    first, second = evaluated[1][0]
    assert (first[0], second[0]) == (2, 2)
    assert "Run this command on one host" in first[2].replace("\n", " ")


@pytest.mark.long
def test_two_processes_start_from_the_newest_weights_of_a_run(ended):
    """Only the primary process compares them with those of a resumed run."""
    root, results = ended
    first, second = results["started from a run"]
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    record = json.loads((root / "e" / "config.json").read_text())
    assert record["weights"]["init_from"]["step"] == 12


@pytest.mark.long
def test_error_on_one_process_is_printed_once_and_ends_all(ended):
    """The last command: the processes end with its exit code."""
    root, results = ended
    first, second = results["no images"]
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert "error: Process 1 on " in first[2] and "/nowhere" in first[2]
    assert "error" not in second[2] + second[1]
    assert not (root / "d" / "checkpoints").exists() and not (root / "d" / "config.json").exists()


@pytest.mark.long
def test_workdir_that_is_not_shared_is_refused(ended):
    first, second = ended[1]["not shared"]
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert "Process 1 sees a different workdir than process 0" in first[2]
    assert "on a shared file system" in first[2] and second[2] == ""


@pytest.mark.long
def test_different_config_on_one_process_is_refused(ended):
    first, second = ended[1]["another config"]
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert "Process 1 sees a different config than process 0" in first[2] and second[2] == ""


# A single process


def test_join_without_a_cluster_does_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    called = []

    def initialize(**options):
        called.append(options)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    processes.join(10.4)
    assert called == [{"heartbeat_timeout_seconds": 10}]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.join(10)
    assert len(called) == 1
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(
        UserError, match="without a valid JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS"
    ):
        processes.join(10)
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UserError, match="Cannot join the other processes"):
        processes.join(10)
    assert called[-1] == called[0] | {"num_processes": 4, "process_id": 2}


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
ONE_EACH, FOUR_EACH = (SLURM | {"SLURM_STEP_TASKS_PER_NODE": n} for n in ("1(x4)", "4(x2)"))
SHARED = {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "all_devices", "idle"),
    [
        ({}, False, ""),
        (ONE_EACH | SHARED, True, ""),  # one task per node
        (ONE_EACH, True, ""),
        (OPEN_MPI, True, ""),
        (FOUR_EACH | SHARED, False, ""),  # one task per GPU
        (FOUR_EACH | SHARED | {"CUDA_VISIBLE_DEVICES": "2"}, True, ""),  # --gpus-per-task=1
        (FOUR_EACH | {"SLURM_GPUS_ON_NODE": "4"}, False, ""),
        (FOUR_EACH, False, ""),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2"} | SHARED, False, "so 2 of 4 GPUs are idle"),
        (ONE_EACH | SHARED | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, False, ""),
    ],
)
def test_process_uses_all_gpus_unless_its_node_has_one_process_per_gpu(
    monkeypatch, caplog, environment, all_devices, idle
):
    for name in [*SLURM, *SHARED, *OPEN_MPI, "SLURM_STEP_TASKS_PER_NODE", "JAX_LOCAL_DEVICE_IDS"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.uses_all_devices() == all_devices
    assert idle in caplog.text and bool(idle) == bool(caplog.text)
    if idle:
        assert "Slurm: --ntasks-per-node=4" in caplog.text
    called = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: called.append(given))
    processes.join(10)
    assert ("local_device_ids" in called[0]) == all_devices


def test_single_task_of_a_launcher_joins_nothing(monkeypatch):
    """It sees all devices; JAX would give it the first GPU only."""
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: pytest.fail("joined"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.join(10)
    # A shell in a step of one task, in which mpirun starts more.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(pytest.fail.Exception):
        processes.join(10)


JOINED = """
from jax._src import xla_bridge
import jax
from ssl_jax.run import processes
processes.join(10)
print(jax.process_count(), xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""


@pytest.mark.long
def test_one_task_per_node_restricts_no_gpus_in_jax_itself():
    """Two simulated nodes. An empty list of devices is not documented to mean all of them."""
    environment = os.environ | {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED],
            env=environment | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [process.communicate(timeout=300)[0] for process in started] == ["2 all\n"] * 2


def test_collectives_of_a_single_process_return_its_values():
    assert processes.is_primary()
    np.testing.assert_array_equal(processes.gather([1, 2]), [[1, 2]])
    assert processes.from_first({"a": 1.5}) == {"a": 1.5}
    processes.require_same({"data": "x"})
    with pytest.raises(UserError, match="as it is"), processes.raise_on_all_processes():
        raise UserError("as it is")


def test_sigterm_waits_for_the_step_and_is_raised_at_once_in_an_evaluation():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Stop() as stop:
        assert not stop.asked(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked(2)
        with pytest.raises(processes.StoppedError), stop.at_once():
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGTERM) is before
    with processes.Stop() as stop, pytest.raises(processes.StoppedError), stop.at_once():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("x.jpg can't be read."), 2, "error: Process 3: x.jpg can't be read."),
        (jax.errors.JaxRuntimeError("lost\nmore"), 1, "another process may be lost (lost)"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    ],
)
def test_error_of_one_process_exits_it_at_once(monkeypatch, error, code, words):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    left = []
    monkeypatch.setattr("os._exit", left.append)
    shown = []
    with processes.alone_on_failure(shown.append):
        raise error
    assert left == [code] and words in shown[0]
    agreed = UserError("known to all")
    agreed.on_all_processes = True
    with pytest.raises(UserError, match="known to all"), processes.alone_on_failure(shown.append):
        raise agreed
    assert left == [code]
