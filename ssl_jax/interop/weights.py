"""Networks as a file of our own: a run's, or what `ssl-jax import` has read elsewhere.

A safetensors file whose names are paths in the tree, `params/encoder/stem/conv1/kernel`, with the
config as JSON in its header. It is read without executing anything.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ssl_jax.config import from_json, to_json
from ssl_jax.errors import UserError
from ssl_jax.files import replacing

Pytree = Any
FORMAT = "1"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Networks by name, among them the encoder.

    Attributes:
      config: of the run; of an import, what is known of its recipe.
      params: float32 arrays by network and path.
      batch_stats: BatchNorm's running statistics, the same.
      step: of the checkpoint; 0 where none is known.
      source: what they were read from, in a few words; "" of a run of our own.
      left_out: names in a foreign file that no network here has.
    """

    config: ConfigDict
    params: Pytree
    batch_stats: Pytree
    step: int = 0
    source: str = ""
    left_out: tuple[str, ...] = ()


def write_weights(weights: Weights, file: str | Path) -> None:
    """Writes a file that `ssl_jax.load` and `config.init_from.path` take.

    Args:
      weights: to write.
      file: named `*.safetensors`; replaced as a whole.

    Raises:
      UserError: another name, or it can't be written.
    """
    tree = {"params": weights.params, "batch_stats": weights.batch_stats}
    header = {
        "ssl_jax": FORMAT,
        "config": json.dumps(portable_config(weights.config)),
        "step": str(weights.step),
        "source": weights.source,
    }
    save(flatten_dict(tree, sep="/"), file, header)


def portable_config(config: ConfigDict) -> dict[str, Any]:
    """A run's config as it goes along with its weights: others log to places of their own."""
    return {**to_json(config), "wandb": ""}


def save(arrays: Mapping[str, np.ndarray], file: str | Path, header: Mapping[str, str]) -> None:
    """Writes arrays as safetensors, whole or not at all.

    Raises:
      UserError: a name that doesn't end in .safetensors, or it can't be written.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise UserError(f"The file to write is {file}: give it a name that ends in .safetensors.")
    whole = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    try:
        with replacing(file) as temporary:
            save_file(whole, temporary, dict(header))
            # safetensors lets nobody else read what it writes.
            temporary.chmod(0o666 & ~_umask())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can't be written ({error}): choose another.") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays by name and the header's text.

    Raises:
      UserError: it is no such file, or corrupt.
    """
    with _opened(file) as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return arrays, dict(opened.metadata() or {})


def read_header(file: Path) -> dict[str, str]:
    """The header's text alone.

    Raises:
      UserError: it is no such file, or corrupt.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{file} can't be read as safetensors ({error}): fetch it anew.") from error


def own(file: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> Weights:
    """The weights in a file that `write_weights` wrote.

    Raises:
      UserError: it is of another version, or corrupt.
    """
    config = own_config(file, header)
    try:
        tree = unflatten_dict(arrays, sep="/")
        step, source = int(header["step"]), header["source"]
        params, stats = tree["params"], tree.get("batch_stats", {})
        if not all(isinstance(x, dict) for x in (*params.values(), *stats.values())):
            raise ValueError("an array stands where a network should")
        return Weights(config, params, stats, step, source)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is corrupt ({error}): export it anew.") from error


def own_config(file: Path, header: Mapping[str, str]) -> ConfigDict:
    """The config in its header.

    Raises:
      UserError: it is of another version, or corrupt.
    """
    if header["ssl_jax"] != FORMAT:
        raise UserError(
            f"{file} was written in format {header['ssl_jax']}, and this version of ssl_jax reads "
            f"{FORMAT}: use the version that wrote it."
        )
    try:
        return from_json(json.loads(header["config"]))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is corrupt ({error}): export it anew.") from error
