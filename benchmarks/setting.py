"""What all runs in the folder of a benchmark share."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def recorded_setting(file: Path, setting: dict[str, Any], runs: str) -> Iterator[bool]:
    """Records the setting of the runs that the block makes, or exits if another one is recorded.

    Finished runs are kept, so runs with a different setting would be mistaken for these. If the
    first run is refused, such as for a wrong config key, the new setting is removed again.

    Args:
      file: the record.
      setting: of the runs.
      runs: pattern of the runs' files, relative to the record's folder.

    Yields:
      Whether the setting is new.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    if new:
        file.write_text(json.dumps(setting))
    elif (started := json.loads(file.read_text())) != setting:
        sys.exit(f"{file.parent} holds runs with {started}, not {setting}. Set --workdir.")
    try:
        yield new
    except BaseException:
        if new and not any(file.parent.glob(runs)):
            file.unlink()
        raise


def require_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes it a usage error if the file of --train or --test, where given, doesn't exist."""
    for name in ("train", "test"):
        file = getattr(args, name)
        if file and not Path(file).is_file():
            parser.error(f"--{name}={file} is not a file")
