"""Operations that a program asks for, counted in its jaxpr: products, scan bodies in full."""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def product_flops(function: Callable, *arguments: object) -> int:
    """Return the floating-point operations of all matrix products: 2 · m · n · k each."""
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        inner = sum(_of(one) for one in _inner(equation))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _inner(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs within an equation; of a while loop the body, as if it ran once."""
    found = []
    for name, value in equation.params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "cond_jaxpr"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found
