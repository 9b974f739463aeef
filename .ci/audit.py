"""Prints known vulnerabilities of the versions in constraints.txt.

Exits with code 1 if there are any, or if the check itself fails. If the package index doesn't
respond, a message is printed and the code is 0, because that says nothing about the versions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# Parts of pip_audit's output if the index doesn't respond; other failures are errors.
NO_RESPONSE = ("requests.exceptions.", "ServiceError", "your network may be blocking")
pins = Path(__file__).parents[1] / "constraints.txt"
command = [sys.executable, "-m", "pip_audit", "-r", str(pins), "--no-deps", "--disable-pip"]
# pip_audit uses the certificates that are set for pip.
environment = {"REQUESTS_CA_BUNDLE": os.environ.get("PIP_CERT", "")} | os.environ
done = subprocess.run(
    [*command, "--format=json", "--progress-spinner=off"],
    capture_output=True,
    text=True,
    env=environment,
)
try:
    found = json.loads(done.stdout)["dependencies"]
except (ValueError, KeyError):
    errors = done.stderr.strip().splitlines() or ["no output"]
    no_response = any(part in done.stderr for part in NO_RESPONSE)
    reason = "the package index doesn't respond" if no_response else "pip_audit failed"
    print(f"audit: {reason} ({errors[-1][:200]})")
    sys.exit(not no_response)
vulnerable = [package for package in found if package.get("vulns")]
for package in vulnerable:
    identifiers = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
    print(f"audit: {package['name']} {package['version']}: {identifiers}")
unknown = sum("skip_reason" in package for package in found)
print(f"audit: {len(found)} packages, {len(vulnerable)} vulnerable, {unknown} unknown to the index")
sys.exit(bool(vulnerable))
