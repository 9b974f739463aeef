"""The packages of the extra `data`, imported on first use: TensorFlow, TFDS and ArrayRecord.

No other module imports them. Importing ssl_jax, training from arrays and augmenting on the device
need none of them.
"""

import contextlib
import functools
import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ssl_jax.errors import importing


@functools.cache
def load_tensorflow(name: str = "tensorflow") -> ModuleType:
    """Imports TensorFlow without its log lines and without GPUs.

    Args:
      name: the module to return, of TensorFlow or of another package of the extra `data`.

    Raises:
      UserError: the import fails, such as for a package that is not installed.
    """
    # Only exceptions should reach the terminal, no banners and no log lines of the decoders. JAX
    # sets the level to 1 when it is imported first; any other level is the user's choice.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused here, and it prints a banner
    # Whatever is read of a gs:// file, TensorFlow reads this much after it; by default 64 MiB.
    os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(2**20))
    with importing(name, "data"):
        tensorflow = importlib.import_module("tensorflow")
        module = importlib.import_module(name)
    with contextlib.suppress(RuntimeError):  # the calling program already uses TensorFlow
        tensorflow.config.set_visible_devices([], "GPU")  # GPU memory belongs to JAX
    return module


class _LazyModule:
    """A module that is imported when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(load_tensorflow(self._name), attribute)


if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from array_record.python import array_record_data_source, array_record_module
    from tensorflow.core.protobuf import trackable_object_graph_pb2
else:
    tf = _LazyModule("tensorflow")
    tfds = _LazyModule("tensorflow_datasets")
    array_record_data_source = _LazyModule("array_record.python.array_record_data_source")
    array_record_module = _LazyModule("array_record.python.array_record_module")
    trackable_object_graph_pb2 = _LazyModule("tensorflow.core.protobuf.trackable_object_graph_pb2")
