"""The benchmark of the linear classifier at toy size."""

import importlib
import re
import sys

import pytest


@pytest.fixture
def benchmark():
    return importlib.import_module("classifier")


def test_a_row_per_size_and_an_estimate_for_imagenet(benchmark, monkeypatch, capsys):
    sizes = ["--sizes=90x6x3,60x6x3", "--end=60x6x3"]
    monkeypatch.setattr(sys, "argv", ["classifier.py", *sizes, "--rounds=1"])
    benchmark.main()
    header, _, *rows, _, estimate, _, end = capsys.readouterr().out.splitlines()
    assert header == (
        "| features | classes | seconds | preparation | evaluations | TFLOP | TFLOP/s |"
    )
    assert [row.split(" | ")[:2] for row in rows] == [["| 90 × 6", "3"], ["| 60 × 6", "3"]]
    assert all(float(cell) > 0 for row in rows for cell in row.split(" | ")[2:5])
    assert re.match(
        r"1,281,167 × 2,048 features of 1,000 classes: [\d,]+ TFLOP per fit with \d+ evaluations, "
        r"[\d,]+ minutes with preparation at the rates of 60 × 6 × 3; 6 fits .* 26 GB over all "
        r"devices\.$",
        estimate,
    )
    assert re.match(
        r"End of a run, 60 × 6 × 3, as many held-out images: [\d.]+ s for the probe, [\d.]+ s per "
        r"trial of 1, .* of 5, .* of 10; with 20 trials [\d.]+ minutes per row\.$",
        end,
    )


def test_an_incomplete_size_is_a_usage_error(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--sizes=90x6"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "IMAGESxWIDTHxCLASSES" in capsys.readouterr().err
