"""The benchmark of convolutions at toy size."""

import importlib
import json
import re
import sys


def test_a_row_per_stage_and_a_column_per_way(monkeypatch, capsys):
    benchmark = importlib.import_module("convolutions")
    monkeypatch.setattr(benchmark, "STAGES", ((2, 4), (3, 2)))
    asked = []

    def in_process(python, by, views, flags):
        """The same call in this process, whose flags are fixed."""
        asked.append((python, by, flags))
        if by == "torch":
            return ["1 / 2 / 3"] * 2
        monkeypatch.setattr(sys, "argv", ["convolutions.py", f"--by={by}", f"--views={views}"])
        benchmark.main()
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(benchmark, "in_process", in_process)
    monkeypatch.setenv("XLA_FLAGS", "")
    more = "--xla_cpu_use_onednn=true"
    monkeypatch.setattr(
        sys, "argv", ["convolutions.py", "--peer-python=peer", f"--more={more}", "--views=1"]
    )
    benchmark.main()
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header == f"| channels, size | torch | ssl_jax | jaxlib | with the flag | and {more} |"
    assert [row.split(" | ")[0] for row in rows] == ["| 2, 4×4", "| 3, 2×2"]
    assert all(
        re.fullmatch(r"\d+ / \d+ / \d+", c) for row in rows for c in row[2:-2].split(" | ")[1:]
    )
    assert [by for _, by, _ in asked] == ["torch", "ssl_jax", "jax", "jax", "jax"]
    assert asked[1][2] and asked[2][2] == "" and asked[4][2].endswith(f" {more}")
