import errno
import json
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    assert_trees_close,
    make_step,
    method_config,
    random_source,
    ready_views,
    unaugmented,
)

from ssl_jax.data.index import Index
from ssl_jax.errors import UserError
from ssl_jax.run import checkpoint
from ssl_jax.run.checkpoint import (
    Checkpoints,
    _seal,
    damage,
    fingerprint,
    quarantine_corrupt,
    steps_in,
)
from ssl_jax.spmd import make_spmd


def state_of(value):
    return {"step": jnp.int32(value), "w": jnp.full((4,), value, jnp.float32), "method_state": {}}


def test_restored_state_is_bit_exact_with_its_sharding(tmp_path):
    spmd = make_spmd()
    state = spmd.replicate({"w": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)})
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(7, state)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.latest_step == 7
    like = jax.tree.map(jnp.zeros_like, state)
    like = spmd.replicate(like)
    restored = again.restore(7, like)
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["w"].sharding == like["w"].sharding
    again.close()


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, knn in [(1, 0.5), (2, 0.9), (3, 0.6), (4, None), (5, 0.7), (6, 0.1)]:
        checkpoints.save(step, state_of(step), knn)
    checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.close()
    # A restart still knows the best one.
    again = Checkpoints(tmp_path / "c", keep=2)
    again.save(7, state_of(7), 0.3)
    again.save(8, state_of(8))
    again.close()
    assert Checkpoints(tmp_path / "c", read_only=True).steps == [2, 7, 8]


def test_empty_directory_has_no_latest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step is None and checkpoints.steps == []
    checkpoints.close()


def test_checkpoint_of_different_shapes_is_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    with pytest.raises(UserError, match="Cannot read the checkpoint of step 1") as caught:
        checkpoints.restore(1, {"step": jnp.int32(0), "other": jnp.zeros(3)})
    assert "\n" not in str(caught.value)
    larger = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2), x.dtype), state_of(1))
    with pytest.raises(UserError, match=r"\(step has shape \(\), not \(2,\)\)\. If an"):
        checkpoints.restore(1, larger)
    checkpoints.close()


# Damage


def written(path, steps=(1, 2, 3)):
    checkpoints = Checkpoints(path, keep=5)
    for step in steps:
        checkpoints.save(step, {"w": jnp.full((64, 64), step, jnp.float32)})
    checkpoints.close()
    return {step: path / str(step) for step in steps}


def largest(folder):
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "checksums.json"]
    return max(files, key=lambda file: file.stat().st_size)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": (flip_a_bit, "different content"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "a different size"),
    "missing": (lambda file: file.unlink(), "No such file"),
}


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../../outside", "link", "a\0b", "device", "", ".", "fifo", "x" * 300]
)
def test_checksums_of_files_outside_the_folder_are_invalid_and_not_read(
    tmp_path, monkeypatch, name
):
    folder = tmp_path / "c" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    (folder / "checksums.json").write_text(json.dumps({name: [0, 0]}))
    monkeypatch.setattr(checkpoint, "_checksum", lambda file: pytest.fail(f"read {file}"))
    assert damage(folder)


@pytest.mark.parametrize("huge", [False, True])
def test_checksums_that_are_no_file_or_huge_are_not_read(tmp_path, huge):
    (tmp_path / "checksums.json").symlink_to(tmp_path / "huge" if huge else "/dev/zero")
    if huge:
        (tmp_path / "huge").touch()
        os.truncate(tmp_path / "huge", 2**40)
    assert damage(tmp_path) == "its checksums.json is invalid"


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{}", '{"a": 3}', '{"a": [1]}', "\x00"])
def test_malformed_checksums_are_damage(tmp_path, text):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "checksums.json").write_text(text)
    assert damage(tmp_path) in ("its checksums.json is invalid", "its checksums.json is unreadable")


@pytest.mark.parametrize("kind", DAMAGE)
def test_corrupt_checkpoint_is_detected_and_refused(tmp_path, kind):
    damage_it, words = DAMAGE[kind]
    folders = written(tmp_path / "c")
    assert [damage(folder) for folder in folders.values()] == [""] * 3
    damage_it(largest(folders[3]))
    assert words in damage(folders[3])
    checkpoints = Checkpoints(tmp_path / "c", read_only=True)
    like = {"w": jnp.zeros((64, 64))}
    with pytest.raises(UserError, match=r"step 3 .* is corrupt .*Use another step: \[1, 2\]"):
        checkpoints.restore(3, like)
    assert float(checkpoints.restore(2, like)["w"][0, 0]) == 2
    for step in (1, 2):
        damage_it(largest(folders[step]))
    with pytest.raises(UserError, match=r"step 3 .* is corrupt .*Restore it from a backup\."):
        checkpoints.restore(3, like)
    checkpoints.close()


def test_corrupt_checkpoints_are_quarantined_until_one_is_intact(tmp_path):
    folders = written(tmp_path / "c")
    for step in (1, 2, 3):
        flip_a_bit(largest(folders[step]))
    (folders[1] / "checksums.json").unlink()  # as if killed right after writing it
    for _ in range(2):  # the same steps, corrupt again
        warnings = quarantine_corrupt(tmp_path / "c", tmp_path / "corrupt")
        assert [line.partition(" (")[0] for line in warnings] == [
            "warning: the checkpoint of step 3 is corrupt",
            "warning: the checkpoint of step 2 is corrupt",
        ]
        assert quarantine_corrupt(tmp_path / "c", tmp_path / "corrupt") == []
        folders = written(tmp_path / "c", (2, 3))
        for step in (2, 3):
            flip_a_bit(largest(folders[step]))
    names = sorted(file.name for file in (tmp_path / "corrupt").iterdir())
    assert names == ["2", "2_1", "3", "3_1"]


@pytest.mark.parametrize("name", ["²", "007", "١", "1.orbax-checkpoint-tmp"])
def test_folders_that_are_not_named_as_a_step_are_no_checkpoints(tmp_path, name):
    (tmp_path / name).mkdir()
    assert quarantine_corrupt(tmp_path, tmp_path / "corrupt") == []
    (tmp_path / "10").mkdir()
    (tmp_path / "9").mkdir()
    assert steps_in(tmp_path) == [9, 10]


def test_run_is_refused_if_no_checkpoint_is_intact(tmp_path):
    folders = written(tmp_path / "c")
    for folder in folders.values():
        flip_a_bit(largest(folder))
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact \(step 3: "):
        quarantine_corrupt(tmp_path / "c", tmp_path / "corrupt")
    assert all(folder.exists() for folder in folders.values())
    (folders[3] / "checksums.json").write_text("null")
    assert damage(folders[3]) == "its checksums.json is invalid"


@pytest.mark.parametrize("name", ["checksums.json", "an array"])
@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.ESTALE, errno.EIO, errno.EACCES])
def test_file_that_cannot_be_read_now_is_not_taken_for_damage(tmp_path, monkeypatch, name, code):
    folder = tmp_path / "c" / "7"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a").write_bytes(b"1234")
    _seal(folder, threading.Event())
    plain = Path.open

    def unreadable(file, *args, **options):
        if file.name == {"an array": "a"}.get(name, name):
            raise OSError(code, os.strerror(code), str(file))
        return plain(file, *args, **options)

    def unreadable_sums(file):
        with file.open("rb") as opened:
            return opened.read()

    assert damage(folder) == ""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", unreadable)
        patched.setattr(checkpoint, "read_regular", unreadable_sums)
        message = rf"Cannot read .*7/.* \({os.strerror(code)}\)\. Check the file system, then rerun"
        with pytest.raises(UserError, match=message):
            quarantine_corrupt(tmp_path / "c", tmp_path / "corrupt")
    assert folder.exists() and not (tmp_path / "corrupt").exists()


def test_read_error_while_restoring_moves_nothing(tmp_path, monkeypatch):
    """A checkpoint without checksums, which would be moved if its content were wrong."""
    killed_before_its_checksums(tmp_path / "c")
    checkpoints = Checkpoints(tmp_path / "c")

    def unreadable(*args, **options):
        raise ValueError("UNKNOWN: Error reading a [OS error 110: Connection timed out]")

    monkeypatch.setattr(checkpoints._manager, "restore", unreadable)
    with pytest.raises(
        UserError, match=r"Cannot read .*2 \(Connection timed out\)\. Check the fil"
    ):
        checkpoints.restore_newest({"w": jnp.zeros((300, 300))}, tmp_path / "d")
    monkeypatch.undo()
    checkpoints.close()
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("place", ["c", "c/5.orbax-checkpoint-tmp", "c/7"])
def test_link_in_place_of_a_checkpoint_folder_is_refused(tmp_path, place):
    """A run's folder may come from someone else; Orbax would write through the link."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to(elsewhere)
    (elsewhere / "1").mkdir()  # corrupt, as it is empty
    (elsewhere / "2").mkdir()
    (elsewhere / "2" / "a").write_bytes(b"x")
    for use in (Checkpoints, lambda directory: quarantine_corrupt(directory, tmp_path / "aside")):
        with pytest.raises(UserError, match="is a link, through which a run doesn't write"):
            use(tmp_path / "c")
    assert sorted(entry.name for entry in elsewhere.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
@pytest.mark.parametrize(
    "name",
    [
        "_CHECKPOINT_METADATA",
        "metrics/metrics",
        "default/_METADATA",
        "default/manifest.ocdbt",
        "checksums.json",
    ],
)
def test_pipes_and_links_in_a_checkpoint_are_not_opened(tmp_path, name, make):
    """Orbax opens these names, and would wait for the pipe's other end."""
    file = tmp_path / "c" / "2" / name
    file.parent.mkdir(parents=True)
    (file.parent / "a").write_bytes(b"x")
    if name != "checksums.json":
        _seal(tmp_path / "c" / "2", threading.Event())
    make(file)
    assert damage(tmp_path / "c" / "2")
    assert fingerprint(tmp_path / "c" / "2")
    with pytest.raises(UserError, match=f"{name} is a link, a pipe or a device, which isn't read"):
        Checkpoints(tmp_path / "c", read_only=True)


NOISE = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)


def killed_before_its_checksums(path, steps=(1, 2)):
    """Writes checkpoints of noise, the newest without checksums; returns its largest file."""
    checkpoints = Checkpoints(path, keep=5)
    for step in steps:
        checkpoints.save(step, {"w": jnp.asarray(NOISE * step)})
    checkpoints.close()
    (path / str(steps[-1]) / "checksums.json").unlink()
    return largest(path / str(steps[-1]))


def test_restoring_adds_missing_checksums(tmp_path):
    file = killed_before_its_checksums(tmp_path / "c")
    checkpoints = Checkpoints(tmp_path / "c")
    step, state, warnings = checkpoints.restore_newest({"w": jnp.zeros((300, 300))}, tmp_path / "d")
    checkpoints.close()
    assert (step, warnings) == (2, [])
    np.testing.assert_array_equal(state["w"], NOISE * 2)
    assert damage(tmp_path / "c" / "2") == ""
    flip_a_bit(file)
    assert "different content" in damage(tmp_path / "c" / "2")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage_it", [halve, Path.unlink])
def test_unreadable_checkpoint_without_checksums_is_replaced_by_the_previous(tmp_path, damage_it):
    damage_it(killed_before_its_checksums(tmp_path / "c", (1, 2, 3)))
    flip_a_bit(largest(tmp_path / "c" / "2"))  # with checksums, but corrupt as well
    checkpoints = Checkpoints(tmp_path / "c")
    like = {"w": jnp.zeros((300, 300))}
    step, state, warnings = checkpoints.restore_newest(like, tmp_path / "d")
    np.testing.assert_array_equal(state["w"], NOISE)
    assert step == checkpoints.latest_step == 1
    assert "step 3 is corrupt (it can't be read)" in warnings[0]
    assert "step 2 is corrupt" in warnings[1]
    assert sorted(folder.name for folder in (tmp_path / "d").iterdir()) == ["2", "3"]
    checkpoints.save(2, state)
    checkpoints.close()
    assert checkpoints.steps == [1, 2] and damage(tmp_path / "c" / "2") == ""


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_nothing_is_moved_if_the_previous_checkpoint_is_unreadable_too(tmp_path, steps):
    halve(killed_before_its_checksums(tmp_path / "c", steps))
    checkpoints = Checkpoints(tmp_path / "c")
    other = {"w": jnp.zeros((7, 7)), "more": jnp.zeros(3)}
    with pytest.raises(UserError, match="Cannot read the checkpoint of step 1"):
        checkpoints.restore_newest(other, tmp_path / "d")
    checkpoints.close()
    assert checkpoints.steps == list(steps) and not (tmp_path / "d").exists()


def test_nothing_is_moved_among_several_processes(tmp_path, monkeypatch):
    halve(killed_before_its_checksums(tmp_path / "c"))
    checkpoints = Checkpoints(tmp_path / "c")

    def unreadable(*args, **options):
        raise Exception("Error reading chunk\nand more")

    monkeypatch.setattr(checkpoints._manager, "restore", unreadable)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="Cannot read .* step 2 .*Error reading chunk.*delete"):
        checkpoints.restore_newest({"w": jnp.zeros((300, 300))}, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    monkeypatch.undo()
    checkpoints.close()


def test_unwritable_checksums_are_a_warning(tmp_path, monkeypatch, caplog):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssl_jax.run.checkpoint.replacing", full)
    written(tmp_path / "c", (1,))
    assert damage(tmp_path / "c" / "1") == ""
    assert "cannot write the checksums of the checkpoint of step 1 (No space left" in caplog.text


@pytest.mark.parametrize("sums", ['{"default/_METADATA": 5}', "{}", "[]", '{"x": "ab"}'])
def test_invalid_checksums_are_damage(tmp_path, sums):
    folder = written(tmp_path / "c", (1,))[1]
    (folder / "checksums.json").write_text(sums)
    assert damage(folder) == "its checksums.json is invalid"


def test_empty_folder_is_a_corrupt_checkpoint(tmp_path):
    written(tmp_path / "c", (1,))
    (tmp_path / "c" / "2" / "default").mkdir(parents=True)
    (warning,) = quarantine_corrupt(tmp_path / "c", tmp_path / "d")
    assert "step 2 is corrupt (it is empty)" in warning


@pytest.mark.parametrize("when", ["wait_until_finished", "close"])
def test_full_disk_is_a_user_error_whenever_orbax_raises_it(tmp_path, monkeypatch, when):
    def full(*args, **options):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Error writing a [OS error 28: No space left on device]"
        )

    checkpoints = Checkpoints(tmp_path / "c")
    monkeypatch.setattr(checkpoints._manager, when, full)
    with pytest.raises(UserError, match=r"\(No space left on device\)"):
        checkpoints.close()
    monkeypatch.undo()
    checkpoints.close()


def test_failed_write_leaves_no_waiting_thread(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c")
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **options: None)
    checkpoints.save(1, state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.close()
    assert not checkpoints._sealing.is_alive()


@pytest.mark.long
@pytest.mark.parametrize("method", ["moco", "swav"])
def test_resume_on_fewer_or_more_devices_matches_an_uninterrupted_run(method, tmp_path):
    """Two steps per number of devices, from checkpoint to checkpoint, with queues in use."""
    config, source = method_config(method), random_source(256)
    config.model.bn_group_size = 0
    config.optim.update(warmup_epochs=0.0, frozen_steps=0, lr=0.1)
    config.swav.queue_from_epoch = 0.0
    index = Index(source.num_examples, config.batch_size, config.seed)
    made = {}

    def on(devices):
        if devices not in made:
            spmd = make_spmd(devices=jax.devices()[:devices])
            step, like = make_step(config, spmd, source, unaugmented)[1:3]
            made[devices] = spmd, step, like
        return made[devices]

    def steps(devices, state, numbers):
        spmd, step, _ = on(devices)
        losses = []
        for number in numbers:
            ids = index.ids(number)
            batch = {"id": ids, "label": source.labels[ids], "views": ready_views(config, ids)}
            state, metrics = step(state, spmd.place_batch(batch), {})
            losses.append(float(metrics["loss"]))
        return state, losses

    spmd, _, like = on(8)
    first = jax.device_get(like)  # it is donated twice, and its sharding is used at the end
    whole, expected = steps(8, spmd.replicate(first), range(10))
    state, losses = steps(8, spmd.replicate(first), range(2))
    for number, devices in enumerate((4, 2, 1, 8), start=1):
        folder = tmp_path / str(number)
        for read_only in (False, True):
            checkpoints = Checkpoints(folder, read_only=read_only)
            if not read_only:
                checkpoints.save(2 * number, state)
            else:
                state = checkpoints.restore(2 * number, on(devices)[2])
            checkpoints.close()
        state, more = steps(devices, state, range(2 * number, 2 * number + 2))
        losses += more
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    queues = [{k: v for k, v in s.method_state.items() if "queue" in k} for s in (state, whole)]
    assert queues[0]
    assert_trees_close(*queues, rtol=1e-2, atol=1e-3)
