import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest
from tiny import METHODS, method_config, with_two_stages

from ssl_jax.config import Schedule, default_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.run.folder import (
    FORMAT,
    changed_settings,
    git_revision,
    lock_text,
    locked,
    note_resumption,
    read_config,
    read_record,
    started_config,
    write_config,
)
from ssl_jax.step import assemble, init_state
from ssl_jax.train import pretrain

TREES = Path(__file__).with_name("checkpoint_trees.json")


def test_second_run_is_refused_and_the_first_is_named(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from ssl_jax.run.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"Another run is using .*process {first.pid} on"):
            with locked(tmp_path):
                pass
    finally:
        first.kill()
        first.communicate()
    # A killed run leaves no lock behind.
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_lock_text_waits_for_a_late_file_and_is_empty_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / ".lock").write_text("process 7"))
    assert lock_text(tmp_path) == "process 7"
    assert lock_text(tmp_path / "none", patience_s=0.0) == ""


def test_unwritable_workdir_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="Cannot write .*file/run .*choose another --workdir"):
        with locked(file / "run"):
            pass


def full_disk(monkeypatch, module, name):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)


def test_full_disk_while_writing_the_lock_is_a_user_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        full_disk(patched, os, "write")
        with pytest.raises(UserError, match=r"Cannot write .*\.lock \(No space left on device\)"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):  # nothing holds it
        pass


def test_full_disk_while_writing_the_record_is_a_user_error(tmp_path, monkeypatch):
    message = r"Cannot write .*config.json \(No space left on device\)\. Check free disk space"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=message):
        full_disk(patched, Path, "write_text")
        write_config(tmp_path, default_config(), "")
    assert list(tmp_path.iterdir()) == []
    write_config(tmp_path, default_config(), "")
    before = (tmp_path / "config.json").read_bytes()
    full_disk(monkeypatch, Path, "write_text")
    with pytest.raises(UserError, match=message):
        note_resumption(tmp_path, 3, default_config())
    assert (tmp_path / "config.json").read_bytes() == before


def test_record_has_config_and_environment(tmp_path):
    config = default_config()
    write_config(tmp_path, config, "the command")
    record = read_record(tmp_path)
    assert record["config"] == to_json(config)
    assert record["command"] == "the command"
    assert {"jax", "jaxlib", "ssl_jax", "python"} <= record["versions"].keys()
    assert record["devices"]["count"] == 8
    assert record["devices"]["cpu_cores"] == os.cpu_count()
    assert "xla_force_host_platform_device_count" in record["xla_flags"]
    assert to_json(read_config(tmp_path)) == to_json(config)


def test_different_config_is_refused_with_the_differences(tmp_path):
    config = default_config()
    write_config(tmp_path, config, "")
    before = (tmp_path / "config.json").read_bytes()
    write_config(tmp_path, config, "again")
    config.optim.lr = 0.7
    with pytest.raises(UserError, match="optim.lr: 0.3 -> 0.7.*no checkpoint yet"):
        write_config(tmp_path, config, "")
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    with pytest.raises(UserError, match="choose another --workdir.$"):
        write_config(tmp_path, config, "")
    assert (tmp_path / "config.json").read_bytes() == before


CHANGED = {
    "log_every": 7,
    "wandb": "tries",
    "checkpoint.every_epochs": 3.0,
    "checkpoint.keep": 5,
    "data.dir": "/scratch/images",
    "data.test_dir": "/scratch/test",
    "data.on_bad_image": "skip",
    "eval.knn_every_epochs": 1.0,
    "eval.trials": 3,
    "init_from.path": "runs/renamed",
}


def test_keys_that_do_not_affect_training_may_change_and_the_change_is_recorded(tmp_path):
    config = default_config()
    config.init_from.path = "runs/a"
    write_config(tmp_path, config, "", "96 images", "32 images")
    config.update_from_flattened_dict(CHANGED)
    write_config(tmp_path, config, "", "96 images", "32 images")
    changed = changed_settings(tmp_path, config)
    assert [line.partition(":")[0] for line in changed] == sorted(CHANGED)
    assert "log_every: 10 -> 7" in changed
    note_resumption(tmp_path, 5, config)
    record = read_record(tmp_path)
    assert record["config"] == to_json(config) and changed_settings(tmp_path, config) == []
    assert record["resumed"][0]["step"] == 5 and record["resumed"][0]["changed"] == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [("eval.probe", False), ("init_from.path", "runs/b"), ("distill.teacher", "b"), ("seed", 1)],
)
def test_keys_that_affect_training_or_add_initial_weights_are_refused(tmp_path, key, value):
    config = default_config()
    write_config(tmp_path, config, "")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"different config \({key}: "):
        write_config(tmp_path, config, "")


LONGER = {"epochs": 300.0, "log_every": 7}


def test_only_the_length_of_an_extended_run_may_differ_and_the_earlier_one_is_recorded(tmp_path):
    config = default_config()
    write_config(tmp_path, config, "")
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    before = (tmp_path / "config.json").read_bytes()
    config.update_from_flattened_dict(LONGER)
    message = r"\(epochs: .*\)\. Use its config, pass --extend if it is to be longer"
    with pytest.raises(UserError, match=message):
        write_config(tmp_path, config, "")
    write_config(tmp_path, config, "", extend=True)
    config.optim.lr = 0.7
    with pytest.raises(UserError, match=r"\(optim.lr: 0.3 -> 0.7\)\. Use its config, or choose"):
        write_config(tmp_path, config, "", extend=True)
    with pytest.raises(
        UserError, match=r"\(epochs: .*; optim.lr: .*\)\. Use its config, or choose"
    ):
        write_config(tmp_path, config, "")
    assert (tmp_path / "config.json").read_bytes() == before
    config.optim.lr = 0.3
    note_resumption(tmp_path, 12, config, extended_from=12)
    record = read_record(tmp_path)
    (resumed,) = record["resumed"]
    assert record["config"] == to_json(config) and resumed["extended_from"] == resumed["step"] == 12
    assert resumed["changed"] == ["epochs: 100.0 -> 300.0", "log_every: 10 -> 7"]


@pytest.mark.parametrize("missing", ["checkpoint", "config.json", "folder"])
def test_folder_without_a_checkpoint_cannot_be_extended(tmp_path, missing):
    workdir = tmp_path / "run1"
    if missing == "checkpoint":
        workdir.mkdir()
        write_config(workdir, default_config(), "")
    elif missing == "config.json":
        (workdir / "checkpoints" / "12").mkdir(parents=True)
    else:
        (tmp_path / "run2").mkdir()
    reason = "it doesn't exist" if missing == "folder" else f"it has no {missing}"
    hint = r" Did you mean '.*run2'\?" if missing == "folder" else ""
    before = sorted(tmp_path.rglob("*"))
    message = rf"no run to extend, as {reason}\.{hint} Set --workdir"
    with pytest.raises(UserError, match=message):
        started_config(workdir, extend=True)
    with pytest.raises(UserError, match=message):
        pretrain(default_config(), workdir, extend=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_without_config_json_are_refused(tmp_path):
    write_config(tmp_path, default_config(), "")
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.json.* Restore that file"):
        write_config(tmp_path, default_config(), "")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}', "[" * 100_000])
def test_corrupt_record_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="Cannot read .*config.json"):
        read_record(tmp_path)


@pytest.mark.parametrize("resumed", [5, [5], {"a": 1}])
def test_record_with_malformed_resumptions_is_refused(tmp_path, resumed):
    write_config(tmp_path, default_config(), "")
    record = read_record(tmp_path) | {"resumed": resumed}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"Cannot read .*\(resumed is not a list of gro"):
        read_record(tmp_path)


@pytest.mark.parametrize("change", [{"views": 10**30}, {"epochs": 10**400}, {"views": [1]}])
def test_config_of_other_types_is_refused(tmp_path, change):
    write_config(tmp_path, default_config(), "")
    record = read_record(tmp_path)
    record["config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="config.epochs takes a number|another version .* views"):
        read_config(tmp_path)


@pytest.mark.parametrize("number", [0, 1, "x", None])
def test_run_of_another_format_is_refused(tmp_path, number):
    write_config(tmp_path, default_config(), "")
    record = read_record(tmp_path)
    record["format"], record["versions"]["ssl_jax"] = number, "9.9"
    before = json.dumps(record)
    (tmp_path / "config.json").write_text(before)
    message = rf"has format {number!r}, written by ssl_jax 9\.9, .* reads format {FORMAT}\. Use "
    for use in (read_record, read_config, lambda path: write_config(path, default_config(), "")):
        with pytest.raises(UserError, match=message):
            use(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_checkpoint_tree_changes_only_with_the_format():
    """Changing the state breaks resumed runs: raise FORMAT and renew the file.

    `python tests/run/test_run_folder.py` writes it.
    """
    assert json.loads(TREES.read_text()) == {"format": FORMAT, **trees()}


def trees():
    """A checksum of the leaves, shapes and dtypes of each method's state."""
    found = {}
    for name in METHODS:
        config = with_two_stages(method_config(name))
        method, optimizer, _ = assemble(config, Schedule(1, 1))
        state = jax.eval_shape(lambda m=method, o=optimizer, c=config: init_state(m, o, c))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        lines = [f"{jax.tree_util.keystr(p)} {x.shape} {x.dtype}\n" for p, x in leaves]
        found[name] = f"{len(lines)} leaves, {zlib.crc32(''.join(lines).encode()):08x}"
    return found


@pytest.mark.parametrize(
    "name", ["checkpoints", "corrupt", "earlier", "evals", "projector", "wandb"]
)
def test_links_in_place_of_a_runs_folders_are_refused_at_the_start(tmp_path, name):
    """Otherwise the last of them would be found once all is computed."""
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    workdir.mkdir(), elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    (workdir / name).symlink_to(elsewhere)
    advice = f"/{name} is a link, .* If the folder that it points to is this run's, move that"
    with pytest.raises(UserError, match=advice), locked(workdir):
        pass
    assert not (workdir / ".lock").exists()
    # The advice.
    (workdir / name).unlink()
    elsewhere.rename(workdir / name)
    with locked(workdir):
        assert (workdir / name / "kept").exists()


def test_file_in_place_of_a_runs_folder_is_refused_at_the_start(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file, .* Move it away"), locked(tmp_path):
        pass


def test_lock_with_another_name_is_refused_and_unchanged(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").hardlink_to(tmp_path / "mine")
    message = r"\.lock \(it has other names, hard links\)\. Move it away if no run is using"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / ".lock").rename(tmp_path / "away")  # the advice
    with locked(tmp_path):
        assert (tmp_path / "mine").read_text() == "mine"


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        read_record(tmp_path)


def test_record_is_plain_json(tmp_path):
    write_config(tmp_path, default_config(), "")
    assert json.loads((tmp_path / "config.json").read_text())["config"]["views"]["view1"]["size"]


def test_other_training_data_is_refused_and_other_held_out_data_once_evaluated(tmp_path):
    write_config(tmp_path, default_config(), "", data="64 images, checksum 1")
    write_config(tmp_path, default_config(), "", data="64 images, checksum 1")
    with pytest.raises(
        UserError, match=r"other training images \(64 images -> 65 images\)\. Restore"
    ):
        write_config(tmp_path, default_config(), "", data="65 images, checksum 2")
    again = (tmp_path, default_config(), "", "64 images, checksum 1")
    write_config(*again, "9 images", evaluated=True)  # there were none to evaluate on
    write_config(*again, "9 images")
    note_resumption(tmp_path, 5, default_config(), test_data="9 images")
    (change,) = read_record(tmp_path)["resumed"][0]["changed"]
    assert change == "the held-out data: none -> 9 images"
    write_config(*again, "")
    with pytest.raises(UserError, match="the held-out data: 9 images -> none"):
        write_config(*again, "", evaluated=True)  # or results would be taken for those of others


def test_run_counts_as_started_from_its_first_checkpoint(tmp_path):
    write_config(tmp_path, default_config(), "")
    assert started_config(tmp_path) is None
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    assert to_json(started_config(tmp_path)) == to_json(default_config())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog, code):
    """As Lustre is often mounted."""

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert f"cannot lock {tmp_path} ({os.strerror(code)})" in caplog.text


@pytest.mark.parametrize("replaced", [False, True])
def test_folder_renamed_while_a_run_holds_it_is_detected(tmp_path, replaced):
    workdir = tmp_path / "run"
    with locked(workdir) as require_in_place:
        require_in_place()
        workdir.rename(tmp_path / "renamed")
        if replaced:
            workdir.mkdir()
        with pytest.raises(UserError, match="/run was renamed or removed .* Rename it back"):
            require_in_place()
        if not replaced:
            (tmp_path / "renamed").rename(workdir)
            require_in_place()


def test_revision_is_empty_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() == ""


def test_resumption_is_recorded_with_environment_changes(tmp_path, monkeypatch):
    write_config(tmp_path, default_config(), "")
    assert note_resumption(tmp_path, 3, default_config()) == []
    monkeypatch.setenv("XLA_FLAGS", "--other")
    (changed,) = note_resumption(tmp_path, 5, default_config())
    assert changed.startswith("xla_flags: ") and changed.endswith("-> --other")
    assert [c["step"] for c in read_record(tmp_path)["resumed"]] == [3, 5]


def test_values_that_affect_only_warnings_are_recorded_but_no_difference(tmp_path):
    write_config(tmp_path, default_config(), "", derived={"batchnorm_images": 20})
    now = {"batchnorm_images": 20, "trivial_loss": 8.0, "patience": 30}  # keys of later versions
    assert note_resumption(tmp_path, 3, default_config(), now) == []
    later = now | {"batchnorm_images": 40, "patience": 60}
    changed = note_resumption(tmp_path, 5, default_config(), later)
    assert changed == ["derived.batchnorm_images: 20 -> 40"]
    assert read_record(tmp_path)["resumed"][0]["derived"] == now


if __name__ == "__main__":
    TREES.write_text(json.dumps({"format": FORMAT, **trees()}, indent=1) + "\n")
