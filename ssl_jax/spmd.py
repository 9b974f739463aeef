"""The device mesh: maps per-device functions over it and places arrays on it.

The rest of the package is written per device with the named axis `AXIS`, as under pmap. `Spmd.map`
maps these functions by `jax.shard_map` or `jax.pmap`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ssl_jax.errors import UserError

AXIS = "devices"
_DIVIDES = " that divides the batch"  # required of a microbatch only
Pytree = Any
Layout = Literal["replicated", "sharded"]


@dataclasses.dataclass(frozen=True)
class Spmd:
    """A one-axis mesh, and how per-device functions are mapped over it.

    Attributes:
      mesh: all devices of the run, on one axis named `AXIS`.
      mode: "shard_map" or "pmap".
    """

    mesh: Mesh
    mode: str = "shard_map"

    @property
    def size(self) -> int:
        """Number of devices in the mesh."""
        return self.mesh.size

    def sharding(self, layout: Layout) -> NamedSharding:
        """Sharding of arrays with this layout: whole on each device, or split on axis 0."""
        return NamedSharding(self.mesh, _spec(layout))

    def map(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Layout],
        outputs: Layout | Sequence[Layout],
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Compiles a per-device function over the mesh.

        Args:
          function: takes this device's shards; `AXIS` is bound inside it. Its "replicated" results
            must be equal on all devices, which is not checked here.
          inputs: layout of each argument, a pytree of global arrays.
          outputs: layout of each result, or of the single result.
          donate: positions of arguments whose memory the results may reuse.

        Returns:
          A function of global arrays, with the same shapes in both modes.
        """
        if self.mode == "pmap":
            return self._pmap(function, inputs, outputs, donate)
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(map(_spec, inputs)),
            out_specs=_spec(outputs) if isinstance(outputs, str) else tuple(map(_spec, outputs)),
            # If True, JAX rejects BatchNorm's collectives over groups of devices.
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donate)

    def _pmap(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Layout],
        outputs: Layout | Sequence[Layout],
        donate: tuple[int, ...],
    ) -> Callable[..., Any]:
        def axes(layouts: Layout | Sequence[Layout]) -> Any:
            if isinstance(layouts, str):
                return None if layouts == "replicated" else 0
            return tuple(None if layout == "replicated" else 0 for layout in layouts)

        mapped = jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=axes(inputs),
            out_axes=axes(outputs),
            devices=list(self.mesh.devices.flat),
            donate_argnums=donate,
        )

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(self.size, x.shape[0] // self.size, *x.shape[1:])

        def join(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

        def on_global_arrays(*args: Pytree) -> Any:
            per_device = [
                jax.tree.map(split, arg) if layout == "sharded" else arg
                for arg, layout in zip(args, inputs, strict=True)
            ]
            results = mapped(*per_device)
            if isinstance(outputs, str):
                return jax.tree.map(join, results) if outputs == "sharded" else results
            return tuple(
                jax.tree.map(join, result) if layout == "sharded" else result
                for result, layout in zip(results, outputs, strict=True)
            )

        return on_global_arrays

    def replicate(self, tree: Pytree) -> Pytree:
        """Copies a pytree to every device; the copies may be donated.

        Every process passes the same pytree and fills its own devices.
        """
        sharding = self.sharding("replicated")

        def place(x: Any) -> jax.Array:
            # Copy on the host: a device array may alias its input, and donation would destroy it.
            own = np.array(x)
            return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

        return jax.tree.map(place, tree)

    def place_batch(self, batch: Pytree) -> Pytree:
        """Places this process's share of a batch (NumPy, axis 0) on its devices.

        The share is `local_indices` of the global batch, in that order. This is the only explicit
        transfer to the devices between training steps.
        """
        sharding = self.sharding("sharded")
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def local_indices(self, batch_size: int) -> Int[np.ndarray, " local"]:
        """Indices of the global batch that belong to this process's devices.

        Args:
          batch_size: the global batch size, a multiple of `size`.

        Returns:
          Indices, int32, in the order of the mesh; all of them in a single-process run.
        """
        share = batch_size // self.size
        mine = [
            position
            for position, device in enumerate(self.mesh.devices.flat)
            if device.process_index == jax.process_index()
        ]
        rows = np.arange(batch_size, dtype=np.int32).reshape(self.size, share)
        return rows[mine].reshape(-1)


def make_spmd(
    mode: str = "shard_map",
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 0,
    microbatch: int = 0,
) -> Spmd:
    """Builds a mesh of devices.

    Args:
      mode: "shard_map", or "pmap" (single process).
      devices: the devices to use; all by default.
      batch_size: the global batch size, which must divide evenly among the devices; 0: not checked.
      microbatch: the global size of a microbatch, checked in the same way.

    Raises:
      UserError: a batch can't be split evenly, or pmap is requested in several processes.
    """
    devices = list(devices or jax.devices())
    count = len(devices)
    if jax.process_count() > 1 and mode == "pmap":
        raise UserError(
            f"config.spmd is 'pmap', which supports one process, but there are "
            f"{jax.process_count()}. Use 'shard_map'."
        )
    parts = (("batch_size", batch_size, 0, ""), ("microbatch", microbatch, batch_size, _DIVIDES))
    for key, size, whole, condition in parts:
        if size % count:
            fitting = microbatches(whole, count, size) if whole else [size - size % count]
            raise UserError(
                f"config.{key} is {size}, which {count} devices can't share equally. Use a "
                f"multiple of {count}{condition}, such as {max([count, *fitting])}."
            )
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    return Spmd(mesh, mode)


def microbatches(batch_size: int, devices: int, most: int) -> list[int]:
    """Sizes of microbatches that the devices can share, ascending.

    Args:
      batch_size: of the whole step, which each size divides.
      devices: in the mesh.
      most: the largest size.
    """
    small = [n for n in range(1, math.isqrt(batch_size) + 1) if batch_size % n == 0]
    sizes = {*small, *(batch_size // n for n in small)}
    return sorted(size for size in sizes if size % devices == 0 and size <= most)


def device_groups(size: int, group: int) -> tuple[tuple[int, ...], ...] | None:
    """Groups the devices that share BatchNorm statistics.

    Args:
      size: number of devices in the mesh.
      group: devices per group; 0 for a single group.

    Returns:
      Groups of device positions for `axis_index_groups`; None for a single group.

    Raises:
      UserError: the group size doesn't divide the number of devices.
    """
    if group in (0, size):
        return None
    if size % group:
        raise UserError(
            f"config.model.bn_group_size is {group}, which does not divide {size} devices. Use a "
            f"divisor of {size}, or 0 for all devices."
        )
    return tuple(tuple(range(i, i + group)) for i in range(0, size, group))


def _spec(layout: Layout) -> PartitionSpec:
    return PartitionSpec(AXIS) if layout == "sharded" else PartitionSpec()
