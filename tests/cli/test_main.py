"""The command line: help, suggestions for misspelled arguments, errors and tracebacks."""

import argparse
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ssl_jax.cli import main as cli
from ssl_jax.cli.failures import failure_printer
from ssl_jax.cli.parser import path_argument
from ssl_jax.config import apply_overrides, default_config, flatten, load_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.run.folder import FORMAT

ROOT = Path(__file__).parents[2]

COMMANDS = {
    *("pretrain", "sweep", "report", "views", "plan", "features", "knn", "linear", "finetune"),
    *("distill", "transfer", "export", "import", "data", "doctor", "config"),
}


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    return code, *capsys.readouterr()


def parsers():
    """All parsers by command."""
    main = cli._parser()
    found = {"": main, **main.commands}
    return found | {f"data {name}": p for name, p in main.commands["data"].commands.items()}


@pytest.mark.parametrize("typed", parsers())
def test_help_of_every_command_has_an_example(capsys, typed):
    with pytest.raises(SystemExit) as caught:
        cli.main([*typed.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert re.search(rf"^example:\n  ssl-jax {typed or 'pretrain'}\b", out, re.M)
    if not typed:
        assert set(re.findall(r"^    (\w+) ", out, re.M)) == COMMANDS
        assert "Exit codes: 0 success" in out and "docs/" in out


@pytest.mark.parametrize("typed", parsers())
def test_every_example_in_the_help_parses(typed):
    parser = parsers()[typed]
    (example,) = re.findall(r"^  ssl-jax (.*)", parser.epilog.split("\n\n")[0], re.M)[:1]
    _, rest = cli._split_overrides(example.split())
    cli.require_known(cli._parser(), rest)
    assert cli._parser().parse_args(rest).command


@pytest.mark.parametrize("typed", parsers())
def test_help_of_every_option_states_its_default(typed):
    for action in parsers()[typed]._actions:
        if not action.option_strings or action.dest in ("help", "version"):
            continue
        needed = "(required)" if action.required else "(default: "
        assert needed in action.help, action.option_strings
        assert action.help[0].islower(), action.help


def test_defaults_written_out_in_the_help_match_the_code():
    from ssl_jax.downstream import transfer_learning

    parser = parsers()["transfer"]
    for name, values in (("rates", transfer_learning.RATES), ("decays", transfer_learning.DECAYS)):
        (action,) = (a for a in parser._actions if a.dest == name)
        assert f"(default: {','.join(f'{value:g}' for value in values)})" in action.help


def test_missing_command_prints_the_help_and_fails(capsys):
    code, out, err = run(capsys)
    assert code == 2 and out == "" and "pretrain" in err


def test_help_imports_neither_jax_nor_numpy():
    code = (
        "import sys\nfrom ssl_jax.cli import main as cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_overrides_are_accepted_with_and_without_equals_sign():
    arguments = ["--config=a.py", "--config.optim.lr=0.1", "--workdir", "w", "--config.seed", "3"]
    overrides, rest = cli._split_overrides(arguments)
    assert overrides == ["optim.lr=0.1", "seed=3"]
    assert rest == ["--config=a.py", "--workdir", "w"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["pretrian"], "ssl-jax has no command 'pretrian'. Did you mean 'pretrain'?"),
        (["--quite", "knn"], "ssl-jax has no option --quite. Did you mean --quiet?"),
        (["data", "pakc"], "ssl-jax data has no command 'pakc'. Did you mean 'pack'?"),
        (["knn", "--form=a"], "ssl-jax knn has no option --form. Did you mean --from?"),
        # Before argparse finds out that --config is missing.
        (
            ["pretrain", "--confg=a.py", "--workdir=w"],
            "ssl-jax pretrain has no option --confg. Did you mean --config?",
        ),
        (
            ["pretrain", "--confg.seed=1"],
            "ssl-jax pretrain has no option --confg.seed. Did you mean --config.seed?",
        ),
        (
            ["pretrain", "--optim.lr=1"],
            "ssl-jax pretrain has no option --optim.lr. Set the config key with "
            "--config.optim.lr=VALUE.",
        ),
        (
            ["pretrain", "--lr=1"],
            "ssl-jax pretrain has no option --lr. Set the config key with --config.optim.lr=VALUE.",
        ),
        (["pretrain", "--learning-rate=1"], "Set the config key with --config.optim.lr=VALUE."),
        (
            ["pretrain", "--size=96"],
            "with --config.views.view1.size=VALUE or --config.views.view2.size=VALUE.",
        ),
        # The other key of this name, config.init_from.network, is that of --from.
        (["knn", "--network=online"], "Set the config key with --config.eval.network=VALUE."),
        (["knn", "--zzz"], "ssl-jax knn has no option --zzz. See `ssl-jax knn --help`."),
        # No abbreviations: their meaning would change when an option is added.
        (["knn", "--maj", "--from=a"], "has no option --maj. Did you mean --majority?"),
        (
            ["pretrain"],
            "ssl-jax pretrain requires --config, --workdir. See `ssl-jax pretrain --help`.",
        ),
        (["knn", "--from=a", "--k=x"], "ssl-jax knn: argument --k: invalid int value: 'x'. See `"),
        (
            ["export", "--from=a", "--out=b", "--format=torhc"],
            "argument --format: unknown format 'torhc'. Did you mean 'torch'?",
        ),
        (
            ["export", "--from=a", "--out=b", "--format=zzz"],
            "Use one of: torch, jax, program, folder, detectron2, pth. See "
            "`ssl-jax export --help`.",
        ),
        (["knn", "--from=a", "b"], "ssl-jax: unrecognized arguments: b. See `ssl-jax --help`."),
        (["report", "a", "--config.seed=1"], "`report` takes no config. Remove --config.seed=1."),
    ],
)
def test_misspelled_argument_is_reported_on_one_line_with_a_suggestion(capsys, typed, message):
    code, out, err = run(capsys, *typed)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_negative_number_is_not_taken_for_an_option(capsys):
    code, _, err = run(capsys, "knn", "--from=nowhere", "--temperature", "-1.5", "--k", "-1")
    assert code == 2 and "There is no run or weights file at nowhere." in err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_global_flags_are_accepted_anywhere(capsys, monkeypatch, place):
    seen = []
    monkeypatch.setattr("ssl_jax.cli.pack.run", seen.append)
    line = ["data", "pack", ".", "b"]
    line[place:place] = ["--quiet", "--debug"]
    assert run(capsys, *line)[0] == 0
    assert seen[0].quiet and seen[0].debug
    assert run(capsys, "data", "pack", ".", "b")[0] == 0
    assert not seen[1].quiet and not seen[1].debug


def test_user_error_is_printed_on_one_line_with_code_2(capsys, tmp_path):
    code, out, err = run(capsys, "report", str(tmp_path))
    assert code == 2 and out == ""
    assert err == f"error: There is no run in {tmp_path}: config.json is missing.\n"
    code, _, err = run(capsys, "pretrain", "--config=none.py", f"--workdir={tmp_path / 'w'}")
    assert code == 2 and "none.py" in err
    assert not (tmp_path / "w").exists()
    code, _, err = run(capsys, "--debug", "report", str(tmp_path))
    assert code == 2 and err.startswith("Traceback (most recent call last):")
    assert err.endswith(f"error: There is no run in {tmp_path}: config.json is missing.\n")


def test_wrong_path_is_reported_with_a_similar_one(capsys, tmp_path):
    (tmp_path / "config.py").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    a_run = f"--from={tmp_path / 'run'}"
    for line, message in (
        (["pretrain", f"--config={tmp_path}/confg.py", "--workdir=w"], f"'{tmp_path}/config.py'?"),
        (["knn", f"--from={tmp_path}/runn"], f"weights file at {tmp_path}/runn. Did you mean"),
        (["knn", f"--from={tmp_path}/empty"], "empty: config.json is missing."),
        (["report", f"{tmp_path}/runn"], f"Did you mean '{tmp_path}/run'?"),
        (["transfer", a_run, "--sets=no.json"], "no dataset list at no.json (--sets)"),
        (["features", a_run, "--out=nowhere/f.npz"], "no folder nowhere (--out)"),
        (["export", a_run, "--format=jax", "--out=nowhere/f"], "no folder nowhere (--out)"),
        (["views", "--config=c.py", "--out=nowhere/v.png"], "no folder nowhere (--out)"),
        (["import", f"{tmp_path}/moco.pth", "--out=a"], "moco.pth."),
        (["data", "convert", f"{tmp_path}/emty", "out"], f"Did you mean '{tmp_path}/empty'?"),
    ):
        code, _, err = run(capsys, *line)
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("labels", ["10", "0", "nan"])
def test_labels_must_be_a_fraction(capsys, tmp_path, labels):
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(capsys, "finetune", f"--from={tmp_path}", f"--labels={labels}")
    assert code == 2 and f"--labels={labels} is not a fraction" in err and "data.subset" not in err


def test_wrong_path_is_reported_before_jax_is_imported(tmp_path):
    script = (
        "import sys\nfrom ssl_jax.cli import main as cli\n"
        "for line in (['pretrain', '--config=no.py', '--workdir=w'], ['knn', '--from=no'],\n"
        "             ['export', '--from=no', '--format=jax', '--out=a'], ['report', 'no'],\n"
        "             ['data', 'convert', 'no', 'out'], ['import', 'no', '--out=a']):\n"
        "    assert cli.main(line) == 2\n"
        "sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "rank", "terminal", "out", "err"),
    [
        (["finetune"], "0", False, "Starting JAX …\n", ""),
        (["finetune"], "1", False, "", ""),
        (["finetune", "--quiet"], "0", True, "", ""),
        (["finetune", "--json"], "0", True, "", "Starting JAX …\n"),
        (["knn"], "0", True, "", "Starting JAX …\n"),
        (["knn"], "0", False, "", ""),
    ],
)
def test_start_of_jax_is_announced_where_progress_is_printed(
    capsys, monkeypatch, tmp_path, line, rank, terminal, out, err
):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    command = types.SimpleNamespace(run=lambda args: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: command)
    assert run(capsys, *line, f"--from={tmp_path}") == (0, out, err)


BROKEN = """
import sys
from ssl_jax.cli import main as cli
from ssl_jax.data import packed

def broken(*arguments):
    raise KeyError("two\\nlines")

packed.pack = broken
sys.exit(cli.main())
"""


def test_unexpected_error_is_one_line_without_traceback(tmp_path):
    command = [sys.executable, "-c", BROKEN, "data", "pack", tmp_path, "a.npz"]

    def typed(*more):
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)

    plain, debug = typed(), typed("--debug")
    assert plain.returncode == debug.returncode == 1
    message = "error: Unexpected KeyError: 'two\\nlines' (use --debug for the traceback)\n"
    assert plain.stderr == message and plain.stdout == ""
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert ", in broken" in debug.stderr and debug.stderr.endswith(message)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ssl_jax.cli.pretrain.pretrain", ["pretrain", "--config={}/config.py", "--workdir=w"]),
        ("ssl_jax.cli.report.write_report", ["report", "{}"]),
        ("ssl_jax.cli.evals.run_features", ["knn", "--from={}"]),
        ("ssl_jax.interop.export.export_tree", ["export", "--from={}", "--format=jax", "--out=a"]),
        ("ssl_jax.cli.doctor.examine", ["doctor"]),
        ("ssl_jax.cli.plan.fitting", ["plan", "--config={}/config.py", "--topology=h100:8"]),
        ("ssl_jax.cli.views.write_views", ["views", "--config={}/config.py", "--out=a.png"]),
    ],
)
def test_unexpected_error_prints_no_traceback_in_any_command(
    capsys, tmp_path, monkeypatch, where, line
):
    saved = {"format": FORMAT, "config": to_json(default_config()), "command": "c", "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "config.py").write_text(
        "from ssl_jax.config import default_config\ndef get_config(): return default_config()\n"
    )

    def broken(*arguments, **named):
        raise RuntimeError("x" * 1000 + "\nsecond line")

    monkeypatch.setattr(where, broken)
    monkeypatch.setattr("ssl_jax.cli.backend.compile_elsewhere", lambda simulated: None)
    code, out, err = run(capsys, *(word.format(tmp_path) for word in line))
    assert (code, out) == (1, "")
    assert err.startswith("error: Unexpected RuntimeError: xxx") and err.count("\n") == 1
    assert len(err) < 400 and "use --debug for the traceback" in err


@pytest.mark.parametrize("typed", [["--workdir={}"], ["--workdir", "{}"]])
def test_traceback_of_unexpected_error_is_saved_in_the_workdir(
    capsys, tmp_path, monkeypatch, typed
):
    def broken(*arguments, **named):
        raise RuntimeError("broken")

    monkeypatch.setattr("ssl_jax.cli.pretrain.pretrain", broken)
    line = [
        f"--config={ROOT / 'configs' / 'simclr_digits.py'}",
        *(w.format(tmp_path) for w in typed),
    ]
    code, _, err = run(capsys, "pretrain", *line)
    assert code == 1 and err.endswith(f"broken (traceback in {tmp_path / 'error.txt'})\n")
    saved = (tmp_path / "error.txt").read_text()
    assert saved.startswith("Traceback ") and ", in broken" in saved


PATHS = [
    (typed, action)
    for typed, parser in parsers().items()
    for action in parser._actions
    if action.type is path_argument
]
# Not local paths only: a bucket, a topology, or a file with a variant.
OTHER_PATHS = {"data convert": {"folder", "out"}, "plan": {"compare"}}


@pytest.mark.parametrize(
    ("typed", "action"), PATHS, ids=[f"{typed} {action.dest}" for typed, action in PATHS]
)
def test_url_or_nothing_in_place_of_a_path_is_refused_before_anything_is_created(
    capsys, tmp_path, monkeypatch, typed, action
):
    monkeypatch.chdir(tmp_path)
    words = [f"{action.option_strings[0]}=gs://b/x"] if action.option_strings else ["gs://b/x"]
    code, _, err = run(capsys, *typed.split(), *words, *["a"] * (typed == "data pack"))
    assert code == 2 and "gs://b/x is a URL, not a path. Mount the bucket as a folder" in err
    words = [f"{action.option_strings[0]}="] if action.option_strings else [""]
    code, _, err = run(capsys, *typed.split(), *words, *["a"] * (typed == "data pack"))
    assert code == 2 and f"{words[0].rstrip('=')}: the path is empty. Give a path, or ." in err
    assert not list(tmp_path.iterdir())


def test_every_option_that_takes_a_path_is_parsed_as_one():
    for typed, parser in parsers().items():
        found = {action.dest for action in parser._actions if action.type is path_argument}
        named = {"workdir", "out", "run", "folder", "file", "sets", "imported", "others", "results"}
        expected = named & {action.dest for action in parser._actions}
        assert found == expected - OTHER_PATHS.get(typed, set()), typed


def test_tilde_is_expanded_in_every_kind_of_path(capsys, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    (home / "c.py").write_text(
        "from ssl_jax.config import default_config\ndef get_config(): return default_config()\n"
    )
    started = []
    monkeypatch.setattr("ssl_jax.cli.pretrain.pretrain", lambda *given, **_: started.append(given))
    assert run(capsys, "pretrain", "--config=~/c.py", "--workdir=~/runs/a")[0] == 0
    assert started[0][1] == home / "runs" / "a"
    for line in (
        ("report", "~/runs/a"),
        ("knn", "--from=~/runs/a"),
        ("features", "--from=~/runs/a", "--out=~/a/b.npz"),
        ("pretrain", "--config=~/c.py", "--workdir=w", *DATA, "--config.data.dir=~/no.npz"),
    ):
        code, _, err = run(capsys, *line)
        assert code == 2 and (str(home) in err or "no.npz, which doesn't exist" in err), err
    assert not list(elsewhere.iterdir())


DATA = ("--config.data.name=packed",)


@pytest.mark.parametrize("name", ["folder", "packed"])
def test_missing_data_is_reported_before_jax_is_imported(tmp_path, name):
    script = (
        "import sys\n"
        "from ssl_jax.cli.main import pretrain_main\n"
        "code = pretrain_main(sys.argv[1:])\n"
        "print(code, {'jax', 'tensorflow', 'sklearn'} & set(sys.modules))\n"
    )
    line = [f"--config={ROOT / 'configs' / 'simclr_digits.py'}", f"--workdir={tmp_path / 'run'}"]
    line += [f"--config.data.name={name}", f"--config.data.dir={tmp_path / 'image'}"]
    (tmp_path / "images").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, *line], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "2 set()\n" and f"config.data.dir is {tmp_path / 'image'}" in done.stderr
    assert f"Did you mean '{tmp_path / 'images'}'?" in done.stderr


def test_unlistable_folder_gives_no_suggestion(monkeypatch, tmp_path):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UserError, match="There is no config file .*see configs/.$"):
        load_config(str(tmp_path / "a.py"))


def test_error_in_one_of_several_processes_is_one_line(capsys):
    """`processes.alone_on_failure` calls the printer while the error is handled."""
    import traceback

    for debug in (False, True):
        for error in (ValueError("why"), UserError("What to do.")):
            try:
                raise error
            except (ValueError, UserError):
                expected = isinstance(error, UserError)
                text = "error: Process 1: What to do." if expected else traceback.format_exc()
                failure_printer(argparse.Namespace(debug=debug))(text)
            err = capsys.readouterr().err
            assert ("Traceback" in err) == debug
            assert debug or err.count("\n") == 1
            assert ("What to do." if expected else "ValueError: why") in err


def test_interrupt_and_closed_pipe_have_their_exit_codes(capsys, monkeypatch):
    for error, code in ((KeyboardInterrupt, 130), (BrokenPipeError, 1)):

        def broken(args, error=error):
            raise error

        monkeypatch.setattr("ssl_jax.cli.pack.run", broken)
        found, _, err = run(capsys, "data", "pack", ".", "b")
        assert found == code and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [
        (["pretrain", "--config=x.py", "--workdir=a"], True),
        (["finetune", "--from=a"], True),
        (["distill", "--from=a"], True),
        (["linear", "--from=a", "--recipe=moco"], True),
        (["linear", "--from=a"], False),
        (["knn", "--from=a"], False),
        (["export", "--from=a", "--format=program", "--out=b"], False),
        (["report", "a"], False),
    ],
)
def test_interrupt_explains_how_to_resume_if_the_command_trains(
    capsys, monkeypatch, arguments, resumes
):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_execute", interrupted)
    code, _, err = run(capsys, *arguments)
    hint = "; rerun the same command to resume from the newest checkpoint, if there is one"
    assert code == 130 and err == f"\nInterrupted{hint if resumes else ''}.\n"


def test_report_command_writes_the_report(capsys, tmp_path):
    saved = {"format": FORMAT, "config": to_json(default_config()), "command": "c", "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    code, out, _ = run(capsys, "report", str(tmp_path))
    assert code == 0 and out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


def test_config_prints_every_key_as_an_argument_and_marks_changes(capsys):
    file = f"--config={ROOT / 'configs' / 'simclr_digits.py'}"
    assert cli.main(["config", file, "--config.optim.lr=0.7", "--config.steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--config.optim.lr=0.7  # default: 0.3" in lines
    assert "--config.steps=3  # default: 0" in lines
    assert "--config.optim.momentum=0.9" in lines
    config = load_config(str(ROOT / "configs" / "simclr_digits.py"), ["optim.lr=0.7", "steps=3"])
    assert len(lines) == len(flatten(to_json(config)))
    # As arguments, they reproduce the config.
    typed = [line.partition("  #")[0].removeprefix("--config.") for line in lines]
    assert to_json(apply_overrides(config, typed)) == to_json(config)
    assert cli.main(["config", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "simclr"
