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
    git_revision,
    lock_text,
    locked,
    note_continuation,
    read_config,
    read_record,
    write_config,
)
from ssl_jax.step import assemble, init_state

TREES = Path(__file__).with_name("checkpoint_trees.json")


def test_a_second_run_is_refused_and_the_first_named(tmp_path):
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
        with pytest.raises(UserError, match=f"going on in .*process {first.pid} on"):
            with locked(tmp_path):
                pass
    finally:
        first.kill()
        first.communicate()
    # A killed run leaves no lock behind.
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_a_lock_that_comes_late_is_waited_for_and_none_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / ".lock").write_text("process 7"))
    assert lock_text(tmp_path) == "process 7"
    assert lock_text(tmp_path / "none", patience_s=0.0) == ""


def test_an_unwritable_workdir_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="workdir .*file/run can't be written"):
        with locked(file / "run"):
            pass


def full_disk(monkeypatch, module, name):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)


def test_a_full_disk_while_the_lock_is_written_is_a_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        full_disk(patched, os, "write")
        with pytest.raises(UserError, match=r"\.lock can't be written \(No space left on device\)"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):  # nothing holds it
        pass


def test_a_full_disk_while_the_record_is_written_is_a_sentence(tmp_path, monkeypatch):
    told = r"config.json can't be written \(No space left on device\): see that there is space"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=told):
        full_disk(patched, Path, "write_text")
        write_config(tmp_path, default_config(), "")
    assert list(tmp_path.iterdir()) == []
    write_config(tmp_path, default_config(), "")
    before = (tmp_path / "config.json").read_bytes()
    full_disk(monkeypatch, Path, "write_text")
    with pytest.raises(UserError, match=told):
        note_continuation(tmp_path, 3)
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_config_is_recorded_with_what_a_repetition_needs(tmp_path):
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


def test_another_config_is_refused_with_the_difference(tmp_path):
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


def test_checkpoints_whose_config_is_gone_are_refused(tmp_path):
    write_config(tmp_path, default_config(), "")
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has checkpoints but no config.json.*: bring it back"):
        write_config(tmp_path, default_config(), "")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}'])
def test_a_corrupt_record_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json can't be read"):
        read_record(tmp_path)


@pytest.mark.parametrize("number", [0, 2, "x", None])
def test_a_run_of_another_format_is_refused(tmp_path, number):
    write_config(tmp_path, default_config(), "")
    record = read_record(tmp_path)
    record["format"], record["versions"]["ssl_jax"] = number, "9.9"
    before = json.dumps(record)
    (tmp_path / "config.json").write_text(before)
    told = rf"format {number!r}, written by ssl_jax 9\.9, .* reads format 1: use the version that"
    for use in (read_record, read_config, lambda path: write_config(path, default_config(), "")):
        with pytest.raises(UserError, match=told):
            use(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_the_first_runs_name_no_format(tmp_path):
    write_config(tmp_path, default_config(), "")
    record = read_record(tmp_path)
    assert record.pop("format") == FORMAT
    del record["config"]["data"]["timeout_s"]  # a key that came later
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert to_json(read_config(tmp_path)) == to_json(default_config())
    write_config(tmp_path, default_config(), "")  # the run goes on


def test_checkpoints_of_this_format_have_this_tree():
    """A change of the state needs another FORMAT, or runs that go on break: then renew this file.

    `python tests/run/test_run_folder.py` writes it.
    """
    assert json.loads(TREES.read_text()) == {"format": FORMAT, **trees()}


def trees():
    """Of each method's state the leaves with shapes and dtypes, as a checksum."""
    found = {}
    for name in METHODS:
        config = with_two_stages(method_config(name))
        method, optimizer, _ = assemble(config, Schedule(1, 1))
        state = jax.eval_shape(lambda m=method, o=optimizer, c=config: init_state(m, o, c))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        lines = [f"{jax.tree_util.keystr(p)} {x.shape} {x.dtype}\n" for p, x in leaves]
        found[name] = f"{len(lines)} leaves, {zlib.crc32(''.join(lines).encode()):08x}"
    return found


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        read_record(tmp_path)


def test_the_record_is_plain_json(tmp_path):
    write_config(tmp_path, default_config(), "")
    assert json.loads((tmp_path / "config.json").read_text())["config"]["views"]["view1"]["size"]


def test_other_data_is_refused(tmp_path):
    write_config(tmp_path, default_config(), "", data="64 images, checksum 1")
    write_config(tmp_path, default_config(), "", data="64 images, checksum 1")
    with pytest.raises(UserError, match="training data: 64 images, .* -> 65 images"):
        write_config(tmp_path, default_config(), "", data="65 images, checksum 2")


def test_no_git_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() == ""


def test_a_continuation_elsewhere_is_recorded_and_told(tmp_path, monkeypatch):
    write_config(tmp_path, default_config(), "")
    assert note_continuation(tmp_path, 3) == []
    monkeypatch.setenv("XLA_FLAGS", "--other")
    (changed,) = note_continuation(tmp_path, 5)
    assert changed.startswith("xla_flags: ") and changed.endswith("-> --other")
    assert [c["step"] for c in read_record(tmp_path)["continued"]] == [3, 5]


def test_what_judges_a_run_is_recorded_and_no_difference(tmp_path):
    write_config(tmp_path, default_config(), "", derived={"batchnorm_images": 20})
    now = {"batchnorm_images": 20, "trivial_loss": 8.0, "patience": 30}  # later versions' keys
    assert note_continuation(tmp_path, 3, now) == []
    changed = note_continuation(tmp_path, 5, now | {"batchnorm_images": 40, "patience": 60})
    assert changed == ["derived.batchnorm_images: 20 -> 40"]
    assert read_record(tmp_path)["continued"][0]["derived"] == now


if __name__ == "__main__":
    TREES.write_text(json.dumps({"format": FORMAT, **trees()}, indent=1) + "\n")
