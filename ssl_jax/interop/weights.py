"""Networks of a run or an import, in memory and in ssl_jax's own file format.

The file is safetensors with paths in the tree as names, such as `params/encoder/stem/conv1/kernel`,
and the config as JSON in its header. Reading it executes nothing.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ssl_jax.config import from_json, to_json
from ssl_jax.errors import UserError
from ssl_jax.files import ANOTHER, local_path, open_regular, reading, reason, replacing, writing

Pytree = Any
FORMAT = "1"
# Keys with paths, of which exported files keep the last part.
_PATHS = (("data", "dir"), ("data", "test_dir"), ("init_from", "path"), ("distill", "teacher"))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Networks by name, including the encoder.

    Attributes:
      config: the run's; for an import, its network and preprocessing, with defaults otherwise.
      params: float32 arrays by network and path.
      batch_stats: BatchNorm's running statistics, likewise.
      step: of the checkpoint; 0 if unknown.
      source: kind and name of the imported file; "" for a run.
      network: "online" or "target", which of a run's networks they are; "" if there is only one.
      left_out: names in an imported file that no network here has.
    """

    config: ConfigDict
    params: Pytree
    batch_stats: Pytree
    step: int = 0
    source: str = ""
    left_out: tuple[str, ...] = ()
    network: str = ""


def write_weights(weights: Weights, file: str | Path) -> None:
    """Writes a file for `ssl_jax.load` and `config.init_from.path`.

    Args:
      weights: the networks.
      file: `*.safetensors`; replaced atomically.

    Raises:
      UserError: the file has another suffix, or can't be written.
    """
    tree = {"params": weights.params, "batch_stats": weights.batch_stats}
    header = {
        "ssl_jax": FORMAT,
        "config": json.dumps(portable_config(weights.config)),
        "step": str(weights.step),
        "source": weights.source,
        "network": weights.network,
    }
    write_safetensors(flatten_dict(tree, sep="/"), file, header)


def portable_config(config: ConfigDict) -> dict[str, Any]:
    """A run's config as JSON for other users of its weights: no W&B project, no local paths.

    `eval.network` is "default", because the exported network, the only one, may be the other.
    """
    plain = {**to_json(config), "wandb": ""}
    plain["eval"] = {**plain["eval"], "network": "default"}
    for group, key in _PATHS:
        # The last part still names the data.
        plain[group] = {**plain[group], key: PurePath(plain[group][key]).name}
    return plain


def write_safetensors(
    arrays: Mapping[str, np.ndarray], file: str | Path, header: Mapping[str, str]
) -> None:
    """Writes arrays as safetensors, atomically.

    Raises:
      UserError: the file has another suffix, or can't be written.
    """
    file = local_path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"Cannot write {file}: use a name that ends in .safetensors.")
    whole = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    with writing(file, ANOTHER, SafetensorError), replacing(file) as temporary:
        save_file(whole, temporary, dict(header))


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays by name, and the header.

    Raises:
      UserError: the file is not safetensors, or is corrupt.
    """
    with _opened(file) as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return arrays, dict(opened.metadata() or {})


def read_header(file: Path) -> dict[str, str]:
    """Reads only the header.

    Raises:
      UserError: the file is not safetensors, or is corrupt.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with reading(file):
        open_regular(file, sys.maxsize).close()
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"Cannot read {file} as safetensors ({reason(error)}): download or export it again."
        ) from error


def parse_weights(
    file: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> Weights:
    """Converts the contents of a file that `write_weights` wrote.

    Args:
      file: for error messages.
      arrays: by path in the tree.
      header: with the config.

    Raises:
      UserError: the file has another version, or is corrupt.
    """
    config = parse_config(file, header)
    try:
        tree = unflatten_dict(arrays, sep="/")
        step, source = int(header["step"]), header["source"]
        params, stats = tree["params"], tree.get("batch_stats", {})
        if not all(isinstance(x, dict) for x in (*params.values(), *stats.values())):
            raise ValueError("an array in place of a network")
        return Weights(config, params, stats, step, source, network=header.get("network", ""))
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is corrupt ({error}): export it again.") from error


def parse_config(file: Path, header: Mapping[str, str]) -> ConfigDict:
    """The config in the header of a file that `write_weights` wrote.

    Raises:
      UserError: the file has another version, or is corrupt.
    """
    if header["ssl_jax"] != FORMAT:
        raise UserError(
            f"{file} has format {header['ssl_jax']}, but this version of ssl_jax reads {FORMAT}: "
            "use the version that wrote it."
        )
    try:
        return from_json(json.loads(header["config"]))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is corrupt ({error}): export it again.") from error
