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
    """Records the setting in a file of the runs' folder, or exits if a different one is there.

    Finished runs are kept, so runs with a different setting would be mistaken for these.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(setting))
    elif (started := json.loads(file.read_text())) != setting:
        sys.exit(f"{file.parent} holds runs with {started}, not {setting}. Set --workdir.")
