"""Known vulnerabilities of the versions in constraints.txt, as far as the package index tells them.

Ends with code 1 where there are some, or where they can't be looked for; an index that doesn't
answer is told and no error, for it says nothing about the versions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# What pip_audit says then; else it is not installed, or doesn't know what it is asked.
SILENT = ("requests.exceptions.", "ServiceError", "your network may be blocking")
pins = Path(__file__).parents[1] / "constraints.txt"
command = [sys.executable, "-m", "pip_audit", "-r", str(pins), "--no-deps", "--disable-pip"]
# pip's certificates are the index's.
trusted = {"REQUESTS_CA_BUNDLE": os.environ.get("PIP_CERT", "")} | os.environ
done = subprocess.run(
    [*command, "--format=json", "--progress-spinner=off"],
    capture_output=True,
    text=True,
    env=trusted,
)
try:
    found = json.loads(done.stdout)["dependencies"]
except (ValueError, KeyError):
    said = done.stderr.strip().splitlines() or ["nothing"]
    silent = any(words in done.stderr for words in SILENT)
    told = "the index doesn't answer, nothing is known" if silent else "pip_audit failed"
    print(f"audit: {told} ({said[-1][:200]})")
    sys.exit(not silent)
vulnerable = [package for package in found if package.get("vulns")]
for package in vulnerable:
    told = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
    print(f"audit: {package['name']} {package['version']}: {told}")
unknown = sum("skip_reason" in package for package in found)
print(f"audit: {len(found)} packages, {len(vulnerable)} vulnerable, {unknown} unknown to the index")
sys.exit(bool(vulnerable))
