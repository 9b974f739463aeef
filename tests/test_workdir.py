import json
import os
import subprocess
import sys

import pytest

from ssl_jax.config import default_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.workdir import (
    git_revision,
    locked,
    note_continuation,
    read_config,
    read_record,
    write_config,
)


def test_a_second_run_is_refused_and_the_first_named(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from ssl_jax.workdir import locked\n"
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


def test_an_unwritable_workdir_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="workdir .*file/run can't be written"):
        with locked(file / "run"):
            pass


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json can't be read"):
        read_record(tmp_path)


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
