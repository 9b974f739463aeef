"""Estimates the memory and the memory traffic of a traced program on GPUs, without their compiler.

XLA for GPUs computes convolutions, matrix products and reductions one by one, and fuses all other
operations into the kernels that read their results. So an array is written to memory if it is the
result of a convolution, product or reduction, or an operand of a convolution or product; all others
exist only inside a kernel. Compiling for a CPU can't show this: it fuses less, and computes
bfloat16 in float32.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

# Kernels that read whole operands from memory.
_PRODUCTS = {"conv_general_dilated", "dot_general"}
_SLICES = {"gather", "dynamic_slice"}
_UPDATES = {"dynamic_update_slice"}
_KERNELS = {"sort", "top_k", "approx_top_k", "select_and_scatter_add", "select_and_gather_add"}
_COLLECTIVES = {"psum", "psum_invariant", "psum2", "pmax", "pmin", "all_gather", "all_to_all"}
_COLLECTIVES |= {"all_gather_invariant", "reduce_scatter", "ppermute"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """An estimate per device.

    Attributes:
      traffic: bytes read from and written to memory.
      temporary: the largest number of bytes of intermediate arrays at any time.
    """

    traffic: float
    temporary: float


class _Array:
    """An array of the program; `kept` if it is written to memory."""

    __slots__ = ("bytes", "kept", "sources")

    def __init__(self, size: float, kept: bool = False) -> None:
        self.bytes, self.kept = size, kept
        self.sources: frozenset[_Array] = frozenset()  # arrays in memory that it is computed from


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operation, or a loop with its own cost per iteration."""

    name: str
    inputs: list[_Array]
    outputs: list[_Array]
    inside: Cost | None = None
    times: int = 1

    @property
    def is_kernel(self) -> bool:
        """Whether its results are written to memory."""
        name = self.name
        known = name in _PRODUCTS | _SLICES | _UPDATES | _KERNELS | _COLLECTIVES
        reduces = name.startswith(("reduce_", "arg", "cum")) and name != "reduce_precision"
        return self.inside is not None or known or reduces or name.startswith("scatter")


def fused_cost(jaxpr: Any) -> Cost:
    """Estimates the cost of a traced program.

    Args:
      jaxpr: from `jax.make_jaxpr`, a closed jaxpr; arrays inside `shard_map` are per device.
    """
    return _cost(jaxpr.jaxpr)


def _cost(jaxpr: Any) -> Cost:
    given = {v: _Array(_bytes(v), kept=True) for v in (*jaxpr.invars, *jaxpr.constvars)}
    arguments, arrays = set(given.values()), dict(given)
    steps = list(_steps(jaxpr, arrays))
    for step in steps:
        for array in step.outputs if step.is_kernel else ():
            array.kept = True
        for array in step.inputs if step.name in _PRODUCTS or step.inside else ():
            array.kept = True
    results = {arrays[v] for v in jaxpr.outvars if v in arrays} - arguments
    for array in results:
        array.kept = True
    return _simulate(steps, arguments, results)


def _simulate(steps: Sequence[_Step], arguments: set[_Array], results: set[_Array]) -> Cost:
    """Runs the steps in their order, each array alive from its kernel to the last that reads it."""
    traffic = 0.0
    read_together: set[frozenset[_Array]] = set()
    made: dict[_Array, int] = {}
    last: dict[_Array, int] = {}
    inner = [0.0] * len(steps)
    for number, step in enumerate(steps):
        sources = frozenset().union(*(a.sources or {a} for a in step.inputs if a.bytes))
        sources = frozenset(a for a in sources if a.kept)
        for array in step.outputs:
            array.sources = frozenset([array]) if array.kept else sources
            if array.kept:
                made[array] = number
        if not any(array.kept for array in step.outputs):
            continue
        last |= dict.fromkeys(sources, number)
        written = sum(array.bytes for array in step.outputs)
        if step.inside:
            traffic += step.inside.traffic * step.times
            inner[number] = step.inside.temporary
        elif step.name in _SLICES:
            traffic += 2 * written
        elif step.name in _UPDATES:
            traffic += 2 * step.inputs[1].bytes if len(step.inputs) > 1 else written
        elif sources not in read_together or not step.name.startswith("reduce_"):
            # Reductions of the same arrays, such as BatchNorm's two sums, share a kernel.
            traffic += sum(array.bytes for array in sources) + written
            if step.name.startswith("reduce_"):
                read_together.add(sources)
    return Cost(traffic, _peak(made, last, inner, arguments | results))


def _peak(
    made: dict[_Array, int], last: dict[_Array, int], inner: list[float], outside: set[_Array]
) -> float:
    changes = [0.0] * (len(inner) + 1)
    for array, start in made.items():
        if array not in outside:  # arguments and results have memory of their own
            changes[start] += array.bytes
            changes[last.get(array, start) + 1] -= array.bytes
    alive = peak = 0.0
    for change, extra in zip(changes, inner, strict=False):
        alive += change
        peak = max(peak, alive + extra)
    return peak


def _steps(jaxpr: Any, arrays: dict[Any, _Array]) -> Iterator[_Step]:
    """Yields the operations of a jaxpr and of its calls; adds their results to `arrays`."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inputs = [_Array(0) if _is_literal(v) else arrays[v] for v in equation.invars]
        if name in ("scan", "while"):
            outputs = [_Array(_bytes(v)) for v in equation.outvars]
            body = parameters["jaxpr" if name == "scan" else "body_jaxpr"]
            times = parameters.get("length", 1)
            yield _Step(name, inputs, outputs, _cost(body.jaxpr), times)
        elif called := _called(name, parameters):
            arguments = inputs[1:] if name == "cond" else inputs
            inner = dict(zip(called.invars, arguments, strict=True))
            inner |= {v: _Array(_bytes(v), kept=True) for v in called.constvars}
            yield from _steps(called, inner)
            outputs = [_Array(0) if _is_literal(v) else inner[v] for v in called.outvars]
        else:
            outputs = [_Array(_bytes(v)) for v in equation.outvars]
            yield _Step(name, inputs, outputs)
        arrays.update(zip(equation.outvars, outputs, strict=True))


def _called(name: str, parameters: dict[str, Any]) -> Any:
    """Returns the jaxpr that an operation calls once; of a choice, a GPU's or the last."""
    if name == "cond":
        branches, platforms = parameters["branches"], parameters.get("branches_platforms")
        chosen = len(branches) - 1
        for number, names in enumerate(platforms or ()):
            chosen = number if names is None or "cuda" in names else chosen
        return branches[chosen].jaxpr
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in parameters:
            return getattr(parameters[key], "jaxpr", parameters[key])
    return None


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _bytes(variable: Any) -> float:
    aval = variable.aval
    size = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return float(size * math.prod(getattr(aval, "shape", ())))
