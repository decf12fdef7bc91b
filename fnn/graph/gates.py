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
from jaxtyping import Inexact, Shaped

from fnn.types import Array


class Gate(NamedTuple):
    """What a primitive computes and what it passes back.

    Attributes:
        formula: of the value.
        back: for each input the formula of the gradient that comes back to it. Nothing comes back
            to an input without one.
        word: what the gate does to the gradient, in words.
        symbol: the gate in a picture.
        by_hand: whether `back` is evaluated. If not, it describes what `jax.vjp` of the primitive
            computes.
    """

    formula: str
    back: tuple[str, ...]
    word: str
    symbol: str
    by_hand: bool = True


# What a gate computes; then, after each semicolon, what comes back to an input.
FORMULAS = {
    "add": "{0} + {1}; {g}; {g}",
    "add_any": "{0} + {1}; {g}; {g}",
    "sub": "{0} - {1}; {g}; (-{g})",
    "mul": "{0} * {1}; {g} * {1}; {g} * {0}",
    "div": "{0} / {1}; {g} / {1}; {g} * (-{0} / {1}**2)",
    "neg": "-{0}; (-{g})",
    "exp": "exp({0}); {g} * exp({0})",
    "exp2": "2**{0}; {g} * 2**{0} * log(2)",
    "log": "log({0}); {g} / {0}",
    "log1p": "log(1 + {0}); {g} / (1 + {0})",
    "expm1": "(exp({0}) - 1); {g} * exp({0})",
    "sin": "sin({0}); {g} * cos({0})",
    "cos": "cos({0}); {g} * (-sin({0}))",
    "tan": "tan({0}); {g} * (1 + tan({0})**2)",
    "sinh": "sinh({0}); {g} * cosh({0})",
    "cosh": "cosh({0}); {g} * sinh({0})",
    "tanh": "tanh({0}); {g} / cosh({0})**2",
    "atan": "atan({0}); {g} / (1 + {0}**2)",
    "erf": "erf({0}); {g} * 2 / sqrt(pi) * exp(-{0}**2)",
    "logistic": "1 / (1 + exp(-{0})); {g} * σ({0}) * (1 - σ({0}))",
    "square": "{0}**2; {g} * 2 * {0}",
    "sqrt": "sqrt({0}); {g} / (2 * sqrt({0}))",
    "rsqrt": "1 / sqrt({0}); (-{g} / (2 * {0}) / sqrt({0}))",
}

# What `jax.vjp` computes: an exact rule at 0, at a tie or along the axes would be a long formula.
DESCRIPTIONS = {
    "pow": "{0}**{1}; {g} * {1} * {0}**({1} - 1); {g} * {0}**{1} * log({0})",
    "abs": "abs({0}); {g} * sign({0})",
    "max": "max({0}, {1}); {g} * [{0} is larger]; {g} * [{1} is larger]",
    "min": "min({0}, {1}); {g} * [{0} is smaller]; {g} * [{1} is smaller]",
    "reduce_max": "max({0}); {g} at the largest",
    "reduce_min": "min({0}); {g} at the smallest",
    "reduce_sum": "sum({0}); copies of {g}",
    "broadcast_in_dim": "copies of {0}; sum of {g}",
    "dot_general": "{0} @ {1}; {g} @ {1}^T; {0}^T @ {g}",
    "reshape": "reshape({0}); {g} reshaped",
    "squeeze": "squeeze({0}); {g} reshaped",
    "transpose": "transpose({0}); {g} transposed",
    "slice": "slice({0}); {g} in its place",
    "select_n": "where({0}, {2}, {1}); ; {g} where chosen; {g} where chosen",
    "convert_element_type": "cast({0}); {g}",
    "copy": "{0}; {g}",
    "sign": "sign({0})",
    "floor": "floor({0})",
    "ceil": "ceiling({0})",
    "round": "round({0})",
    "stop_gradient": "stop({0})",
}

WORDS = {
    "add": "add distributes",
    "add_any": "add distributes",
    "sub": "sub distributes, once with a minus",
    "mul": "mul swaps the multipliers",
    "neg": "neg turns the sign",
    "logistic": "at most a quarter passes",
    "abs": "abs routes by the sign",
    "max": "max routes to the larger; a tie shares equally",
    "min": "min routes to the smaller; a tie shares equally",
    "reduce_max": "max routes to the larger; a tie shares equally",
    "reduce_min": "min routes to the smaller; a tie shares equally",
    "reduce_sum": "sum copies the gradient to every term",
    "broadcast_in_dim": "copy adds",
    "dot_general": "product: each side gets the other",
    "reshape": "puts entries back where they came from",
    "squeeze": "puts entries back where they came from",
    "transpose": "puts entries back where they came from",
    "slice": "0 for what was left out",
    "select_n": "select routes to the one chosen",
    "convert_element_type": "another dtype",
}

SYMBOLS = {
    "add": "+",
    "add_any": "+",
    "sub": "−",
    "mul": "×",
    "div": "÷",
    "neg": "−",
    "logistic": "σ",
    "square": "^2",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_sum": "Σ",
    "broadcast_in_dim": "copies",
    "dot_general": "@",
    "select_n": "select",
    "convert_element_type": "cast",
    "stop_gradient": "stop",
}


def _make_gate(name: str, text: str) -> Gate:
    formula, *back = text.split("; ")
    word = WORDS.get(name, "")
    return Gate(formula, tuple(back), word, SYMBOLS.get(name, name), name in FORMULAS)


# Gates by the names of JAX's primitives. `jax.vjp` differentiates a primitive without a gate.
# `integer_pow` has a gate of its own for each exponent; see `find_gate`.
GATES = {name: _make_gate(name, text) for name, text in (FORMULAS | DESCRIPTIONS).items()}

# the names that a formula may use
FUNCTIONS = vars(jnp) | {"σ": jax.nn.sigmoid}


def find_gate(
    primitive: str, params: dict[str, Any], inputs: Sequence[Shaped[Array, " ..."]]
) -> Gate | None:
    """Finds the gate of a primitive; None where it has none or its formula does not fit."""
    if any(jnp.iscomplexobj(x) for x in inputs):
        return None
    if primitive == "dot_general":
        # as `a @ b`: the sum is over the last axis of `a` and the first of `b`
        summed = (((inputs[0].ndim - 1,), (0,)), ((), ()))
        if params["dimension_numbers"] != summed or max(x.ndim for x in inputs) > 2:
            return None
    if primitive == "select_n" and len(inputs) != 3:
        return None
    if primitive == "integer_pow":
        return _power(params["y"])
    return GATES.get(primitive)


def evaluate(
    formula: str,
    inputs: Sequence[Any],
    g: Inexact[Array, " ..."] | None = None,
    functions: dict[str, Any] = FUNCTIONS,
) -> Any:
    """Evaluates a formula of the table at one or two inputs, arrays or symbols, and a gradient."""
    known = functions | {"a": inputs[0], "b": inputs[-1], "g": g}
    return eval(formula.format("a", "b", g="g"), known)


def is_differentiable(value: Shaped[Array, " ..."]) -> bool:
    """Whether a gradient flows into an array: its numbers are floating-point or complex ones."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def bracket(text: str) -> str:
    """Puts a negative number or term in brackets."""
    return f"({text})" if text.startswith("-") else text


def _power(n: int) -> Gate:
    """The gate of `x**n`."""
    if n == 0:
        return Gate("{0}**0", (), "", "^0")
    less = "{0}" if n == 2 else f"{{0}}**{bracket(str(n - 1))}"
    exponent = bracket(str(n))
    return Gate(f"{{0}}**{exponent}", (f"{{g}} * {exponent} * {less}",), "", f"^{n}")
