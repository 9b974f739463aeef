"""FLOPs of convolutions and matrix products, counted on what JAX traces."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.config import flat_views, view_shape
from ssl_jax.step import Program


def traced_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Counts the FLOPs of a function's convolutions and matrix products over all devices.

    A multiply-add counts as two; loops count for every iteration. Elementwise operations are left
    out, and so is whatever the compiler adds or removes.

    Args:
      function: A function of arrays.
      *shapes: Shapes and dtypes of its arguments.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*shapes))


def jaxpr_flops(jaxpr: Any) -> float:
    """Counts the FLOPs of a closed jaxpr, as `traced_flops` does."""
    return _count(jaxpr.jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            total += _convolution(equation)
            continue
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * length
            continue
        inner = [_count(called) for called in _called(parameters)]
        if name == "cond":
            total += _of_branches(inner, parameters.get("branches_platforms"))
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "shard_map":
            total += parameters["mesh"].size * sum(inner)
        else:
            total += sum(inner)
    return total


def _of_branches(flops: list[float], platforms: Sequence[Any] | None) -> float:
    """The largest count of a condition's branches, or the plain one's of a choice by platform.

    A TPU's branch of its own is plain. Without one, the cheapest is: others do more work to be
    faster.
    """
    if platforms is None:
        return max(flops, default=0.0)
    tpu = (flops[i] for i, names in enumerate(platforms) if "tpu" in (names or ()))
    return next(tpu, min(flops))


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval
    channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    out = math.prod(equation.outvars[0].aval.shape)
    # In the gradient of a strided convolution, most products are with zeros between the pixels.
    zeros = math.prod(equation.params["lhs_dilation"])
    return float(2 * out * math.prod(kernel.shape) / channels / zeros)


def _called(parameters: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs that an operation calls."""
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr


def model_flops(program: Program) -> float:
    """Counts the FLOPs of training the encoder on all views of one image: three forward passes.

    ResNet-50 at 224 pixels: 24.5 GFLOP per view.
    """
    config, method, state = program.config, program.method, program.state_shapes

    @functools.cache
    def forward(shape: tuple[int, int, int]) -> float:
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

        def features(params: Any, stats: Any, x: Any) -> Any:
            return method.features(params, stats, x)

        return traced_flops(features, state.params, state.method_state["batch_stats"], images)

    return 3 * sum(forward(view_shape(config, view)) for view in flat_views(config))
