"""`make audit` fails on vulnerabilities and errors; it passes if the index doesn't respond."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"
FOUND = '{"dependencies": [{"name": "a", "version": "1", "vulns": %s}]}'
VULNERABLE = '[{"id": "CVE-1"}]'


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        (f"print('{FOUND % '[]'}')", 0, "1 packages, 0 vulnerable"),
        (f"print('{FOUND % VULNERABLE}'); exit(1)", 1, "a 1: CVE-1"),
        ("exit('requests.exceptions.ConnectionError: refused')", 0, "doesn't respond (requests"),
        ("exit('Tip: your network may be blocking this service.')", 0, "doesn't respond (Tip"),
        ("exit('pip-audit: error: unrecognized arguments: -x')", 1, "failed (pip-audit: error"),
        ("exit('No module named pip_audit')", 1, "failed (No module named pip_audit)"),
        ("exit(1)", 1, "failed (no output)"),
    ],
)
def test_audit_passes_without_vulnerabilities_or_response(tmp_path, program, code, words):
    """A fake `pip_audit` module replaces the real one."""
    (tmp_path / "pip_audit.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(AUDIT)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout
