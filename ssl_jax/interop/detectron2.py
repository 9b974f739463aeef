"""detectron2's files of pretrained backbones, and the config that belongs to them.

The file is a pickle of NumPy arrays with detectron2's parameter names, as MoCo's
`detection/convert-pretrain-to-detectron2.py` writes it. detectron2 loads each parameter of a model
whose name ends in one of the file's names.
"""

import io
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.errors import UserError
from ssl_jax.interop.metadata import pixel_statistics, unlike_torchvisions

# detectron2 users have NumPy 1, and protocol 5 stores arrays by a function that it lacks.
_PROTOCOL = 4


def require_detectron2s(config: ConfigDict) -> None:
    """Refuses an encoder that detectron2's ResNet can't compute.

    Raises:
      UserError: naming the differences.
    """
    depth = config.model.depth
    # detectron2 builds depths 18 and 34, too, but not a C4 head for them.
    shallow = [f"depth {depth}"] if depth < 50 else []
    unlike = [*shallow, *unlike_torchvisions(config)]
    if unlike:
        raise UserError(
            f"The encoder has {', '.join(unlike)}, but detectron2's ResNet has depth 50, 101 or "
            "152, width 1, the ImageNet stem, symmetric padding and RGB input: pretrain with these "
            "in config.model, and with config.data.channels=3."
        )


def to_detectron2(state: Mapping[str, np.ndarray]) -> bytes:
    """Converts a state dict with torchvision's names to the content of a detectron2 file."""
    model = {_name(name): np.asarray(value, order="C") for name, value in state.items()}
    content = {"model": model, "__author__": "ssl_jax", "matching_heuristics": True}
    file = io.BytesIO()
    _Pickler(file, _PROTOCOL).dump(content)
    return file.getvalue()


def _name(name: str) -> str:
    """detectron2's name of a parameter, such as res2.0.conv1.norm.bias for layer1.0.bn1.bias."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


class _Pickler(pickle.Pickler):
    """Pickles arrays for every version of NumPy.

    By default, an array is rebuilt by a private function, whose module NumPy 2 renamed. Here it is
    an empty `numpy.ndarray`, which then gets the same state.
    """

    def reducer_override(self, obj: Any) -> Any:
        """What to call for an object, its arguments, and the state that the result is given."""
        if isinstance(obj, np.ndarray):
            return np.ndarray, ((0,),), obj.__reduce__()[2]
        return NotImplemented


def detectron2_config(config: ConfigDict, file: Path) -> list[str]:
    """Lines of detectron2's YAML config without which the encoder computes something else.

    Args:
      config: of the run.
      file: the exported file.
    """
    mean, std = pixel_statistics(config)
    return [
        "MODEL:",
        f"  WEIGHTS: {json.dumps(str(file))}",
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {config.model.depth}",
        "    STRIDE_IN_1X1: False",
        "INPUT:",
        '  FORMAT: "RGB"',
    ]
