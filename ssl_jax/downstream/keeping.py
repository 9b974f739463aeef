"""Where the results of evaluations are kept, and under which names."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_jax.errors import UserError
from ssl_jax.files import local_path, own_folder
from ssl_jax.interop.import_weights import is_weights_file
from ssl_jax.interop.load import results_folder


def results_of(path: str | Path, results: str | Path | None = None) -> Path:
    """The folder that keeps the results of a run or a file of weights.

    Args:
      path: the run's workdir, or the file.
      results: the user's choice; default the run's workdir, or a folder next to the file.

    Raises:
      UserError: the folder next to the file is a link, or `results` is another run's workdir.
    """
    own = results_folder(path)
    if not results:
        return own_folder(own.parent, own.name) if is_weights_file(path) else own
    kept = local_path(results)
    if (kept / "config.json").exists() and kept.resolve() != own.resolve():
        raise UserError(
            f"{kept} contains a config.json, so it is another run, whose report would show these "
            "results as its own. Pass a different folder as --results."
        )
    return kept


def source_of(path: str | Path, kept: Path) -> dict[str, str]:
    """Names the evaluated run in a folder that may keep the results of several; {} in its own."""
    if kept.resolve() == results_folder(path).resolve():
        return {}
    return {"from": str(local_path(path).resolve())}


def result_name(name: str, changes: Mapping[str, Any]) -> str:
    """The name of a result and its file; one with changes gets a name of its own."""
    if not changes:
        return name
    return f"{name}_{zlib.crc32(json.dumps(changes, sort_keys=True).encode()):08x}"
