"""The benchmark of reading images for evaluation at toy size."""

import importlib
import sys

import pytest

pytest.importorskip("tensorflow")


def test_both_ways_read_the_same_images_and_are_compared(monkeypatch, capsys):
    benchmark = importlib.import_module("evaluation_images")
    monkeypatch.setattr(benchmark, "WIDTH", 40)
    monkeypatch.setattr(benchmark, "HEIGHT", 30)
    arguments = ["evaluation_images.py", "--images=5", "--batch=2", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()  # which compares the images
    title, _, header, _, first, second = capsys.readouterr().out.splitlines()
    assert title == "5 images, batches of 2"
    assert header == "| | seconds (median) | images/s | times ssl_jax |"
    assert first.startswith("| one pipeline (ssl_jax) |") and first.endswith("| 1.00 |")
    assert second.startswith("| one pipeline per batch |")
