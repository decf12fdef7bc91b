"""The gates: the formula of each primitive and the gradient that it passes back, a line each.

A gate multiplies the gradient from above by its local derivative. Add distributes, mul swaps the
multipliers, max routes. Where a value is used twice, the gradients add up.

The formulas are Python expressions in which `{0}` and `{1}` stand for the inputs and `{g}` for the
gradient from above. The same text is printed with the names of nodes, evaluated with their values,
and differentiated with sympy's symbols: what is printed is what is computed.

Source: lecture 002 (chain rule, general gate, gates in backward flow).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from fnn.types import Array


class Gate(NamedTuple):
    """What a primitive computes and what it passes back.

    Attributes:
        formula: of the value.
        back: for each input the formula of the gradient that comes back to it. Nothing comes back
            to an input without one.
        word: what the gate does to the gradient, in words.
        symbol: the gate in a picture; the primitive's name if empty.
        by_hand: whether `back` is evaluated. If not, it describes what `jax.vjp` of the primitive
            computes.
    """

    formula: str
    back: tuple[str, ...]
    word: str = ""
    symbol: str = ""
    by_hand: bool = True


_MAX = "max routes to the larger; a tie shares equally"
_MIN = "min routes to the smaller; a tie shares equally"
_SUM = "sum copies the gradient to every term"
_PRODUCT = "product: each side gets the other"
_REORDER = "puts entries back where they came from"
_SELECT = "select routes to the one chosen"
_CHOSEN = "{g} where chosen"

FORMULAS = {
    "add": Gate("{0} + {1}", ("{g}", "{g}"), "add distributes", "+"),
    "add_any": Gate("{0} + {1}", ("{g}", "{g}"), "add distributes", "+"),
    "sub": Gate("{0} - {1}", ("{g}", "(-{g})"), "sub distributes, once with a minus", "−"),
    "mul": Gate("{0} * {1}", ("{g} * {1}", "{g} * {0}"), "mul swaps the multipliers", "×"),
    "div": Gate("{0} / {1}", ("{g} / {1}", "{g} * (-{0} / {1}**2)"), symbol="÷"),
    "neg": Gate("-{0}", ("(-{g})",), "neg turns the sign", "−"),
    "exp": Gate("exp({0})", ("{g} * exp({0})",)),
    "exp2": Gate("2**{0}", ("{g} * 2**{0} * log(2)",)),
    "log": Gate("log({0})", ("{g} / {0}",)),
    "log1p": Gate("log(1 + {0})", ("{g} / (1 + {0})",)),
    "expm1": Gate("(exp({0}) - 1)", ("{g} * exp({0})",)),
    "sin": Gate("sin({0})", ("{g} * cos({0})",)),
    "cos": Gate("cos({0})", ("{g} * (-sin({0}))",)),
    "tan": Gate("tan({0})", ("{g} * (1 + tan({0})**2)",)),
    "sinh": Gate("sinh({0})", ("{g} * cosh({0})",)),
    "cosh": Gate("cosh({0})", ("{g} * sinh({0})",)),
    "tanh": Gate("tanh({0})", ("{g} / cosh({0})**2",)),
    "atan": Gate("atan({0})", ("{g} / (1 + {0}**2)",)),
    "erf": Gate("erf({0})", ("{g} * 2 / sqrt(pi) * exp(-{0}**2)",)),
    "logistic": Gate(
        "1 / (1 + exp(-{0}))",
        ("{g} * σ({0}) * (1 - σ({0}))",),
        "at most a quarter passes",
        "σ",
    ),
    "square": Gate("{0}**2", ("{g} * 2 * {0}",), symbol="^2"),
    "sqrt": Gate("sqrt({0})", ("{g} / (2 * sqrt({0}))",)),
    "rsqrt": Gate("1 / sqrt({0})", ("(-{g} / (2 * {0}) / sqrt({0}))",)),
}

# What `jax.vjp` computes: an exact rule at 0, at a tie or along the axes would be a long formula.
DESCRIPTIONS = {
    "pow": Gate("{0}**{1}", ("{g} * {1} * {0}**({1} - 1)", "{g} * {0}**{1} * log({0})")),
    "abs": Gate("abs({0})", ("{g} * sign({0})",), "abs routes by the sign"),
    "max": Gate("max({0}, {1})", ("{g} * [{0} is larger]", "{g} * [{1} is larger]"), _MAX),
    "min": Gate("min({0}, {1})", ("{g} * [{0} is smaller]", "{g} * [{1} is smaller]"), _MIN),
    "reduce_max": Gate("max({0})", ("{g} at the largest",), _MAX, "max"),
    "reduce_min": Gate("min({0})", ("{g} at the smallest",), _MIN, "min"),
    "reduce_sum": Gate("sum({0})", ("copies of {g}",), _SUM, "Σ"),
    "broadcast_in_dim": Gate("copies of {0}", ("sum of {g}",), "copy adds", "copies"),
    "dot_general": Gate("{0} @ {1}", ("{g} @ {1}^T", "{0}^T @ {g}"), _PRODUCT, "@"),
    "reshape": Gate("reshape({0})", ("{g} reshaped",), _REORDER),
    "squeeze": Gate("squeeze({0})", ("{g} reshaped",), _REORDER),
    "transpose": Gate("transpose({0})", ("{g} transposed",), _REORDER),
    "slice": Gate("slice({0})", ("{g} in its place",), "0 for what was left out"),
    "select_n": Gate("where({0}, {2}, {1})", ("", _CHOSEN, _CHOSEN), _SELECT, "select"),
    "convert_element_type": Gate("cast({0})", ("{g}",), "another dtype", "cast"),
    "copy": Gate("{0}", ("{g}",)),
    "sign": Gate("sign({0})", ()),
    "floor": Gate("floor({0})", ()),
    "ceil": Gate("ceiling({0})", ()),
    "round": Gate("round({0})", ()),
    "stop_gradient": Gate("stop({0})", (), symbol="stop"),
}

# Gates by the names of JAX's primitives. `jax.vjp` differentiates a primitive without a gate.
# `integer_pow` has a gate of its own for each exponent; see `find_gate`.
GATES = FORMULAS | {name: gate._replace(by_hand=False) for name, gate in DESCRIPTIONS.items()}

# the names that a formula may use
FUNCTIONS = vars(jnp) | {"σ": jax.nn.sigmoid}


def find_gate(
    primitive: str,
    params: dict[str, Any],
    inputs: Sequence[Shaped[Array, " ..."]],
) -> Gate | None:
    """Finds the gate of a primitive; None where it has none or its formula does not fit."""
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in inputs):
        return None
    if primitive == "dot_general" and not _is_matrix_product(params, *inputs):
        return None
    if primitive == "select_n" and len(inputs) != 3:
        return None
    if primitive == "integer_pow":
        return _power(params["y"])
    return GATES.get(primitive)


def evaluate(
    formula: str,
    inputs: Sequence[Shaped[Array, " ..."]],
    g: Float[Array, " ..."],
) -> Float[Array, " ..."]:
    """Evaluates a formula of the table at one or two inputs and a gradient."""
    known = FUNCTIONS | {"a": inputs[0], "b": inputs[-1], "g": g}
    return eval(formula.format("a", "b", g="g"), known)


def is_differentiable(value: Shaped[Array, " ..."]) -> bool:
    """Whether a gradient flows into an array: its numbers are floating-point or complex ones."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def bracket(text: str) -> str:
    """Puts a negative number or term in brackets."""
    return f"({text})" if text.startswith("-") else text


def _is_matrix_product(params: dict[str, Any], a: Array, b: Array) -> bool:
    """Whether a product sums over the last axis of `a` and the first of `b`, as `a @ b` does."""
    summed = (((a.ndim - 1,), (0,)), ((), ()))
    return params["dimension_numbers"] == summed and a.ndim <= 2 and b.ndim <= 2


def _power(n: int) -> Gate:
    """The gate of `x**n`."""
    if n == 0:
        return Gate("{0}**0", ())
    less = "{0}" if n == 2 else f"{{0}}**{bracket(str(n - 1))}"
    exponent = bracket(str(n))
    return Gate(f"{{0}}**{exponent}", (f"{{g}} * {exponent} * {less}",), symbol=f"^{n}")
