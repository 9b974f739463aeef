"""The mesh of devices, and everything that knows there is one.

Functions elsewhere are written per device with the named axis `AXIS`, as under pmap; here they are
mapped over the mesh, by `jax.shard_map` or by `jax.pmap`, and arrays are placed for them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ssl_jax.errors import UserError

AXIS = "devices"
_DIVIDES = " that divides the batch"  # a microbatch has to, beside what devices ask of it
Pytree = Any
Layout = Literal["replicated", "sharded"]


@dataclasses.dataclass(frozen=True)
class Spmd:
    """A one-axis mesh and the way per-device functions are mapped over it.

    Attributes:
      mesh: of all devices the run uses, one axis named `AXIS`.
      mode: "shard_map" or "pmap".
    """

    mesh: Mesh
    mode: str = "shard_map"

    @property
    def size(self) -> int:
        """Devices in the mesh."""
        return self.mesh.size

    def sharding(self, layout: Layout) -> NamedSharding:
        """The sharding of arrays with that layout: whole on each device, or split on axis 0."""
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
          function: of this device's shares; `AXIS` is bound inside. What it returns as
            "replicated" must be equal on all devices: nothing here checks it.
          inputs: layout of each argument, a pytree of global arrays.
          outputs: layout of each result, or of the only one.
          donate: arguments whose memory the results may take.

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
            # BatchNorm over groups of devices is not expressible with it on.
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
        """Places a pytree whole on every device, as arrays of its own that may be donated.

        Every process gives the same pytree, and fills its own devices.
        """
        sharding = self.sharding("replicated")

        def place(x: Any) -> jax.Array:
            # Through host memory: a device may alias its input, which donation would then destroy.
            own = np.array(x)
            return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

        return jax.tree.map(place, tree)

    def place_batch(self, batch: Pytree) -> Pytree:
        """Places this process's share of a batch (NumPy, axis 0) on its devices.

        The share is `local_indices` of the global batch, in that order. The only explicit transfer
        to the devices in the steady state of training.
        """
        sharding = self.sharding("sharded")
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def local_indices(self, batch_size: int) -> Int[np.ndarray, " local"]:
        """The rows of a global batch that lie on this process's devices, ascending.

        Args:
          batch_size: of the global batch, a multiple of `size`.

        Returns:
          Row numbers, int32; all of them in a run of one process.
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
    """The mesh of `devices` (default: all there are).

    Args:
      mode: "shard_map", or "pmap" (single process).
      devices: to use, default all.
      batch_size: if given, the global batch to be split over them.
      microbatch: if given, the part of it that they encode at a time.

    Returns:
      The mesh and mapping.

    Raises:
      UserError: a batch can't be split evenly, or pmap is asked for in several processes.
    """
    devices = list(devices or jax.devices())
    count = len(devices)
    if jax.process_count() > 1 and mode == "pmap":
        raise UserError(
            f"config.spmd is 'pmap', which maps over one process, and there are "
            f"{jax.process_count()}: use 'shard_map'."
        )
    parts = (("batch_size", batch_size, 0, ""), ("microbatch", microbatch, batch_size, _DIVIDES))
    for key, size, whole, condition in parts:
        if size % count:
            fitting = [m for m in range(count, size, count) if whole % m == 0]
            raise UserError(
                f"config.{key} is {size}, which {count} devices can't share equally: use a "
                f"multiple of {count}{condition}, such as {max(fitting, default=count)}."
            )
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    return Spmd(mesh, mode)


def device_groups(size: int, group: int) -> tuple[tuple[int, ...], ...] | None:
    """The devices that share BatchNorm statistics.

    Args:
      size: devices in the mesh.
      group: devices in a group; 0 puts all in one.

    Returns:
      Groups of device positions for `axis_index_groups`, None for one group of all.

    Raises:
      UserError: the groups don't divide the devices.
    """
    if group in (0, size):
        return None
    if size % group:
        raise UserError(
            f"config.model.bn_group_size is {group}, but {size} devices can't be split into groups "
            f"of {group}: use a divisor of {size}, or 0 for all devices."
        )
    return tuple(tuple(range(i, i + group)) for i in range(0, size, group))


def _spec(layout: Layout) -> PartitionSpec:
    return PartitionSpec(AXIS) if layout == "sharded" else PartitionSpec()
