"""Vendor specifications of accelerators and their interconnects; nothing here imports JAX."""

import dataclasses
import importlib.util
import math
import re

from ssl_jax.errors import UserError, did_you_mean, install_extra

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of a chip.

    Attributes:
      peak: bfloat16 FLOP/s; TPUs multiply float32 in bfloat16, too, by default.
      memory: Bytes.
      bandwidth: Memory bandwidth, bytes/s.
      link: Bytes/s sent to neighbors over all links, one way.
      cores: JAX devices per chip on a real machine.
      tensor_cores: Cores per TPU chip; two that form one device share its memory.
      compile_as: libtpu's name for the configuration of a real machine; "" for its default.
      axes: Dimensions of the torus; 0 for a GPU.
      float32: FLOP/s of float32 configs as a share of `peak`; on GPUs, JAX multiplies in TF32.
    """

    peak: float
    memory: int
    bandwidth: float
    link: float
    cores: int = 1
    tensor_cores: int = 1
    compile_as: str = ""
    axes: int = 0
    float32: float = 1.0

    def peak_of(self, dtype: str) -> float:
        """FLOP/s of convolutions and matrix products of a config with this `dtype`."""
        return self.peak * (self.float32 if dtype == "float32" else 1.0)


# TPUs: cloud.google.com/tpu/docs/v3 … v6e and, for v3's and v4's links, Jouppi et al.,
# arXiv:2304.01433; GPUs: NVIDIA's data sheets (SXM; dense bfloat16; NVLink one way), memory as
# shown by nvidia-smi.
CHIPS = {
    "v3": Chip(123e12, 32 * GIB, 900e9, 280e9, cores=2, tensor_cores=2, axes=2),
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, tensor_cores=2, compile_as="megacore", axes=3),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, axes=2),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, tensor_cores=2, axes=3),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 400e9, axes=2),
    "a100": Chip(312e12, 81920 * MIB, 2039e9, 300e9, float32=0.5),
    "h100": Chip(989e12, 81559 * MIB, 3350e9, 450e9, float32=0.5),
    "h200": Chip(989e12, 143771 * MIB, 4800e9, 450e9, float32=0.5),
    "b200": Chip(2250e12, 183359 * MIB, 7700e9, 900e9, float32=0.5),
}
BETWEEN_HOSTS = 50e9  # bytes/s per GPU between hosts: 400 Gbit/s
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of connected chips.

    Attributes:
      name: As given, `v4:4x4x4` or `h100:8`.
      chip: The specification of each chip.
      shape: The shape of the torus, or the number of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu is the compiler."""
        return self.chip.axes > 0


_MOST_GPUS, _MOST_TPUS = 4096, 2**14  # XLA crashed when it simulated 100,000 GPUs
# Valid values of --topology, for messages.
EXAMPLES = (
    "v3, v5e and v6e take two numbers such as v5e:4x4, v4 and v5p three such as v4:4x4x4, "
    "a100, h100, h200 and b200 a count such as h100:8"
)


def parse_topology(name: str) -> Topology:
    """Parses `GENERATION:SHAPE`.

    Raises:
      UserError: Unknown generation, a shape that it doesn't have, or too many chips.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name} is not a known chip.{did_you_mean(kind, CHIPS)}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != max(
        chip.axes, 1
    ):
        raise UserError(f"--topology={name} is not a valid shape for {kind}: {EXAMPLES}.")
    topology = Topology(name, chip, tuple(int(n) for n in shape.split("x")))
    if topology.chips > (most := _MOST_TPUS if topology.is_tpu else _MOST_GPUS):
        raise UserError(f"--topology={name} has more than {most} chips. Use fewer.")
    return topology


def require_compiler(topology: Topology) -> None:
    """Checks that the compiler for a topology is installed.

    Raises:
      UserError: libtpu is missing.
    """
    if topology.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"Plans for TPUs need libtpu, which is not installed. {install_extra('plan')}."
        )
