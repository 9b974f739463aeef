"""The table of methods: finished runs, with differences paired over trials."""

import importlib
import json

import pytest


def row(name, trials):
    few = {"mean": sum(trials) / len(trials), "trials": trials}
    return {"name": name, "labels_5": few, "labels_10": few, "linear": 0.9, "knn": 0.8}


def test_table_compares_each_run_with_its_own_baselines(tmp_path):
    rows = [
        row("raw pixels", [0.80, 0.90]),
        row("random init", [0.60, 0.62]),
        row("online network", [0.81, 0.91]),
        row("byol", [0.83, 0.93]),
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    lines = [
        {"step": 1, "loss": 1.0, "embedding_std": 0.5, "images_per_s": 10.0},
        {"step": 2, "loss": 1.0, "embedding_std": 0.6, "images_per_s": 30.0},
        {"step": 2, "rankme": 12.34},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    workdirs = {"byol": tmp_path, "moco": tmp_path / "not_run"}
    table = importlib.import_module("methods").table(workdirs).splitlines()
    assert [line.count("|") for line in table] == [11] * 6
    assert "| random init | 61.0 | -24.0 ± 50.8 |  |" in table[3]
    # The differences are 3 points in both trials.
    assert "| BYOL, online network | 86.0 | +1.0 ± 0.0 | +25.0 ±" in table[4]
    assert "| BYOL | 88.0 | +3.0 ± 0.0 | +27.0 ±" in table[5]
    assert "| 0.60 | 12.3 | 20 |" in table[5]


def test_config_keys_are_set_in_all_runs(tmp_path, monkeypatch, capsys):
    commands = []
    benchmark = importlib.import_module("methods")
    main = benchmark.main

    def pretrain(workdir, arguments):
        commands.append([workdir, *arguments])

    monkeypatch.setattr(benchmark.runs, "pretrain", pretrain)
    more = [f"--workdir={tmp_path}", "--methods=byol,moco"]
    main([*more, "--config.epochs=100.0"])
    assert [command[-1] for command in commands] == ["--config.epochs=100.0"] * 2
    assert [command[-2].rpartition("/")[2] for command in commands] == [
        "byol_digits.py",
        "moco_digits.py",
    ]
    for wrong, message in (
        ([*more, "--epochs=100"], "unrecognized arguments: --epochs=100"),
        (["--methods=mocoo"], "mocoo. Choose from simclr,"),
        (["--data=cifar10", "--train=no.npz", "--test=no.npz"], "--train=no.npz is not a file"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"holds runs with .*epochs=100\.0.*Set --workdir\."):
        main(more)  # finished runs would be taken for runs without the change
    assert len(commands) == 2  # none of the wrong ones has started
