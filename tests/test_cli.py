import json
import subprocess
import sys

import pytest

from ssl_jax import cli
from ssl_jax.config import default_config, to_json


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()


def test_help_of_every_command_has_an_example(capsys):
    for command in ("pretrain", "report", "views"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert f"example: ssl-jax {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_jax():
    code = (
        "import sys\nfrom ssl_jax import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_overrides_come_in_both_forms():
    arguments = ["--config=a.py", "--config.optim.lr=0.1", "--workdir", "w", "--config.seed", "3"]
    overrides, rest = cli._split_overrides(arguments)
    assert overrides == ["optim.lr=0.1", "seed=3"]
    assert rest == ["--config=a.py", "--workdir", "w"]


def test_a_user_error_is_one_line_and_code_2(capsys, tmp_path):
    code, out, err = run(capsys, "report", str(tmp_path))
    assert code == 2 and out == ""
    assert err == f"error: There is no run in {tmp_path}: it has no config.json.\n"
    code, _, err = run(capsys, "pretrain", "--config=none.py", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and "none.py" in err
    assert not (tmp_path / "w").exists()


def test_report_is_written_anew(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"config": to_json(default_config()), "command": "c", "versions": {}})
    )
    code, out, _ = run(capsys, "report", str(tmp_path))
    assert code == 0 and out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()
