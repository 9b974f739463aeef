"""What all runs in the folder of a benchmark share."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def config_changes(parser: argparse.ArgumentParser, more: list[str]) -> list[str]:
    """Checks that the arguments which a parser doesn't know set config keys; else a usage error.

    Returns:
      The arguments, "--config.KEY=VALUE".
    """
    if bad := [text for text in more if not text.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(bad)}")
    return more


def require_setting(file: Path, setting: dict[str, Any]) -> None:
    """Records the setting in a file of the runs' folder, or exits if there are runs with another.

    Finished runs are kept, so runs with a different setting would be mistaken for these. Folders
    of runs that were refused before their start are empty.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    started = json.loads(file.read_text()) if file.exists() else setting
    if started != setting and any(each for each in file.parent.glob("*/*")):
        sys.exit(f"{file.parent} holds runs with {started}, not {setting}. Set --workdir.")
    file.write_text(json.dumps(setting))


def require_file(parser: argparse.ArgumentParser, name: str, file: Path) -> None:
    """Makes it a usage error if an argument's file doesn't exist."""
    if not file.is_file():
        parser.error(f"--{name}={file} is not a file")
