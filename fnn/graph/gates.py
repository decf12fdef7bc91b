"""The gates: what each primitive does to a gradient that flows back through it, one line each.

A gate multiplies the gradient from above (upstream) by its local derivative. Add distributes, mul
swaps the multipliers, max routes; a value that is used twice was copied, and copy adds.

A text such as `"{0} * {1}"` serves twice: names put in (`{all}` for all of them), it is the formula
on the board; sympy's symbols put in, it is evaluated.

Source: lecture 002 (chain rule, general gate, gates in backward flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn.types import Array

Values = Sequence[Array]
Tangents = Sequence[Array | None]
# the local derivative: as text, and `(*inputs, y) -> array`
Partial = tuple[str, Callable[..., Array]]


class Gate(NamedTuple):
    """What a primitive does.

    Attributes:
        text: the formula, with `{0}`, `{1}` for the inputs and `{name}` for parameters.
        word: what it does to the gradient from above.
        partials: as text, in the same terms, for each input (the last one for all that follow) the
            local derivative, or, with `{g}` for the gradient from above, what comes back.
        back: `(upstream, inputs, y, params, takes) -> gradient for each input`, None where nothing
            flows; `takes` says which inputs a gradient is wanted for (0 x inf is NaN: what is not
            wanted is not computed).
        push: `(tangents, inputs, y, params, bind) -> tangent of y`, a tangent None where nothing
            moves, as the result may be; `bind(*inputs)` applies the primitive.
    """

    text: str
    word: str
    partials: tuple[str, ...]
    back: Callable[[Array, Values, Array, dict[str, Any], Sequence[bool]], list[Array | None]]
    push: Callable[[Tangents, Values, Array, dict[str, Any], Callable[..., Array]], Array | None]


def elementwise(text: str, word: str, *partials: Partial, uses: tuple[str, ...] = ()) -> Gate:
    """A gate that acts entry by entry: its local derivatives are all that there is to say.

    `uses` names parameters they are given too.
    """

    def local(d: Callable[..., Array], xs: Values, y: Array, params: dict[str, Any]) -> Array:
        return d(*xs, y, *(params[name] for name in uses))

    def back(
        upstream: Array, xs: Values, y: Array, params: dict[str, Any], takes: Sequence[bool]
    ) -> list[Array | None]:
        return [
            _summed_to(upstream * local(d, xs, y, params), x) if take else None
            for x, (_, d), take in zip(xs, partials, takes, strict=True)
        ]

    def push(
        tangents: Tangents, xs: Values, y: Array, params: dict[str, Any], bind: Callable[..., Array]
    ) -> Array | None:
        terms = [
            local(d, xs, y, params) * t
            for t, (_, d) in zip(tangents, partials, strict=True)
            if t is not None
        ]
        return jnp.broadcast_to(sum(terms[1:], terms[0]), y.shape)

    return Gate(text, word, tuple(t for t, _ in partials), back, push)


def rearrangement(
    text: str,
    word: str,
    upstream: str,
    back: Callable[[Array, Values, dict[str, Any]], list[Array | None]],
) -> Gate:
    """A gate that is linear in all its inputs: a tangent goes through it as a value does.

    `upstream` says what comes back of `{g}`.
    """

    def push(
        tangents: Tangents, xs: Values, y: Array, params: dict[str, Any], bind: Callable[..., Array]
    ) -> Array | None:
        return bind(*_filled(tangents, xs))

    return Gate(text, word, (upstream,), lambda g, xs, y, params, takes: back(g, xs, params), push)


def flat(text: str, word: str = "flat: nothing passes") -> Gate:
    """A gate through which nothing passes."""
    return Gate(
        text,
        word,
        ("0",),
        lambda g, xs, y, params, takes: [None] * len(xs),
        lambda ts, xs, y, params, bind: None,
    )


def _filled(tangents: Tangents, xs: Values) -> list[Array]:
    return [jnp.zeros_like(x) if t is None else t for t, x in zip(tangents, xs, strict=True)]


def _summed_to(g: Array, x: Array) -> Array:
    """A scalar, or an axis of size 1, that met more entries was copied to all of them; copy adds."""
    if x.ndim < g.ndim:
        return g.sum()
    stretched = tuple(i for i in range(x.ndim) if x.shape[i] != g.shape[i])
    return g.sum(stretched, keepdims=True) if stretched else g


def _ties(x: Array, y: Array, other: Array) -> Array:
    """1 where x is the one chosen, 1/2 where both are equal: as `jax.grad` has it."""
    return jnp.where(
        x == y, jnp.where(other == y, jnp.full_like(y, 0.5), jnp.ones_like(y)), jnp.zeros_like(y)
    )


def _sign(x: Array) -> Array:
    """1 at 0 too, as `jax.grad` has it."""
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))


def _power(x: Array, n: Any) -> Array:
    """`n x^(n - 1)` for a whole number n."""
    return n * lax.integer_pow(x, n - 1) if n else jnp.zeros_like(x)


def _pow_base(x: Array, p: Array, y: Array) -> Array:
    less = p - jnp.ones_like(p)
    if jnp.issubdtype(p.dtype, jnp.integer):  # 0 x^-1 is 0 at x = 0 too
        less = jnp.where(p == 0, jnp.ones_like(p), less)
    return p.astype(x.dtype) * lax.pow(x, less)


def _pow_exponent(x: Array, p: Array, y: Array) -> Array:
    return y * jnp.log(jnp.where(x == 0, jnp.ones_like(x), x))


def _dot_back(
    g: Array, xs: Values, y: Array, params: dict[str, Any], takes: Sequence[bool]
) -> list[Array | None]:
    """Each side gets the gradient multiplied by the other side, its axes put back into place (y = a
    b: da = g b^T, db = a^T g)."""
    a, b = xs
    (over_a, over_b), (batch_a, batch_b) = params["dimension_numbers"]
    precision = params["precision"]
    turned = precision[::-1] if isinstance(precision, tuple) else precision
    return [
        _dot_side(g, a, b, (over_a, over_b, batch_a, batch_b), precision, False)
        if takes[0]
        else None,
        _dot_side(g, b, a, (over_b, over_a, batch_b, batch_a), turned, True) if takes[1] else None,
    ]


def _dot_side(
    g: Array, a: Array, b: Array, axes_of: tuple[Any, ...], precision: Any, right: bool
) -> Array:
    """The gradient for `a`.

    `g` has the batch axes, then the free axes of the left side, then those of the right one.
    """
    over_a, over_b, batch_a, batch_b = axes_of
    free_a = [i for i in range(a.ndim) if i not in (*over_a, *batch_a)]
    free_b = [i for i in range(b.ndim) if i not in (*over_b, *batch_b)]
    n = len(batch_a)
    # where g has the free axes of b
    of_b = [n + (i if right else len(free_a) + i) for i in range(len(free_b))]
    numbers = (tuple(of_b), tuple(free_b)), (tuple(range(n)), tuple(batch_b))
    product = lax.dot_general(g, b.astype(g.dtype), numbers, precision=precision).astype(a.dtype)
    # product: batch, free of a, and the axes of b that were summed over, in the order of b
    order = sorted(range(len(over_b)), key=lambda i: over_b[i])
    axes = [*batch_a, *free_a, *(over_a[i] for i in order)]
    return jnp.transpose(product, [axes.index(i) for i in range(a.ndim)])


def _dot_push(
    ts: Tangents, xs: Values, y: Array, params: dict[str, Any], bind: Callable[..., Array]
) -> Array | None:
    terms = ([] if ts[0] is None else [bind(ts[0], xs[1])]) + (
        [] if ts[1] is None else [bind(xs[0], ts[1])]
    )
    return sum(terms[1:], terms[0])


def _sum_back(g: Array, xs: Values, params: dict[str, Any]) -> list[Array | None]:
    return [jnp.broadcast_to(jnp.expand_dims(g, params["axes"]), xs[0].shape)]


def _largest(xs: Values, y: Array, params: dict[str, Any]) -> Array:
    """The share of each entry in the largest (or smallest): 1, or 1 / ties."""
    is_it = (xs[0] == jnp.expand_dims(y, params["axes"])).astype(y.dtype)
    return is_it / is_it.sum(params["axes"], keepdims=True)


def _extreme(text: str) -> Gate:
    def back(
        g: Array, xs: Values, y: Array, params: dict[str, Any], takes: Sequence[bool]
    ) -> list[Array | None]:
        return [_largest(xs, y, params) * jnp.expand_dims(g, params["axes"])]

    def push(
        ts: Tangents, xs: Values, y: Array, params: dict[str, Any], bind: Callable[..., Array]
    ) -> Array | None:
        return None if ts[0] is None else (_largest(xs, y, params) * ts[0]).sum(params["axes"])

    return Gate(
        text,
        "routes to the one chosen; a tie shares equally",
        ("{g} at the one chosen",),
        back,
        push,
    )


def _broadcast_back(g: Array, xs: Values, params: dict[str, Any]) -> list[Array | None]:
    x, kept = xs[0], params["broadcast_dimensions"]
    g = g.sum(tuple(i for i in range(g.ndim) if i not in kept))
    stretched = tuple(i for i in range(x.ndim) if x.shape[i] == 1 and g.shape[i] != 1)
    return [g.sum(stretched, keepdims=True)]


def _concatenate_back(g: Array, xs: Values, params: dict[str, Any]) -> list[Array | None]:
    axis = params["dimension"]
    ends = [sum(x.shape[axis] for x in xs[: i + 1]) for i in range(len(xs))]
    return [
        lax.slice_in_dim(g, end - x.shape[axis], end, axis=axis)
        for x, end in zip(xs, ends, strict=True)
    ]


def _slice_back(g: Array, xs: Values, params: dict[str, Any]) -> list[Array | None]:
    starts, strides = params["start_indices"], params["strides"] or (1,) * g.ndim
    inner = [(n - 1) * s + 1 if n else 0 for n, s in zip(g.shape, strides, strict=True)]
    pads = [
        (a, n - a - m, s - 1)
        for a, n, m, s in zip(starts, xs[0].shape, inner, strides, strict=True)
    ]
    return [lax.pad(g, jnp.zeros((), g.dtype), pads)]


def _select_back(
    g: Array, xs: Values, y: Array, params: dict[str, Any], takes: Sequence[bool]
) -> list[Array | None]:
    which, *cases = xs
    return [
        None,
        *(
            jnp.where(which == jnp.asarray(i, which.dtype), g, jnp.zeros_like(g))
            for i in range(len(cases))
        ),
    ]


_ONE: Partial = ("1", lambda *xs: jnp.ones_like(xs[-1]))
_ERF = 2 / math.sqrt(math.pi)
_SHAPE = "puts entries back where they came from"


GATES: dict[str, Gate] = {
    "add": elementwise("{0} + {1}", "add distributes", _ONE, _ONE),
    "add_any": elementwise("{0} + {1}", "add distributes", _ONE, _ONE),
    "sub": elementwise(
        "{0} - {1}",
        "sub distributes, once with a minus",
        _ONE,
        ("(-1)", lambda a, b, y: -jnp.ones_like(y)),
    ),
    "mul": elementwise(
        "{0} * {1}",
        "mul swaps the multipliers",
        ("{1}", lambda a, b, y: b),
        ("{0}", lambda a, b, y: a),
    ),
    "div": elementwise(
        "{0} / {1}",
        "",
        ("1 / {1}", lambda a, b, y: 1 / b),
        ("(-{0} / {1}**2)", lambda a, b, y: -y / b),
    ),
    "neg": elementwise("-{0}", "neg turns the sign", ("(-1)", lambda a, y: -jnp.ones_like(y))),
    "max": elementwise(
        "Max({0}, {1})",
        "max routes to the larger; a tie shares equally",
        ("[{0} is larger]", lambda a, b, y: _ties(a, y, b)),
        ("[{1} is larger]", lambda a, b, y: _ties(b, y, a)),
    ),
    "min": elementwise(
        "Min({0}, {1})",
        "min routes to the smaller; a tie shares equally",
        ("[{0} is smaller]", lambda a, b, y: _ties(a, y, b)),
        ("[{1} is smaller]", lambda a, b, y: _ties(b, y, a)),
    ),
    "exp": elementwise("exp({0})", "", ("exp({0})", lambda a, y: y)),
    "exp2": elementwise("2**{0}", "", ("log(2) * 2**{0}", lambda a, y: math.log(2) * y)),
    "log": elementwise("log({0})", "", ("1 / {0}", lambda a, y: 1 / a)),
    "log1p": elementwise("log(1 + {0})", "", ("1 / (1 + {0})", lambda a, y: 1 / (1 + a))),
    "expm1": elementwise("(exp({0}) - 1)", "", ("exp({0})", lambda a, y: y + 1)),
    "sin": elementwise("sin({0})", "", ("cos({0})", lambda a, y: jnp.cos(a))),
    "cos": elementwise("cos({0})", "", ("(-sin({0}))", lambda a, y: -jnp.sin(a))),
    "tan": elementwise("tan({0})", "", ("(1 + tan({0})**2)", lambda a, y: 1 + y * y)),
    "sinh": elementwise("sinh({0})", "", ("cosh({0})", lambda a, y: jnp.cosh(a))),
    "cosh": elementwise("cosh({0})", "", ("sinh({0})", lambda a, y: jnp.sinh(a))),
    "tanh": elementwise("tanh({0})", "", ("(1 - tanh({0})**2)", lambda a, y: 1 - y * y)),
    "atan": elementwise("atan({0})", "", ("1 / (1 + {0}**2)", lambda a, y: 1 / (1 + a * a))),
    "logistic": elementwise(
        "1 / (1 + exp(-{0}))",
        "at most a quarter passes",
        ("σ({0}) * (1 - σ({0}))", lambda a, y: y * (1 - y)),
    ),
    "erf": elementwise(
        "erf({0})", "", ("2 / sqrt(pi) * exp(-{0}**2)", lambda a, y: _ERF * jnp.exp(-a * a))
    ),
    "pow": elementwise(
        "{0}**{1}", "", ("{1} * {0}**({1} - 1)", _pow_base), ("{0}**{1} * log({0})", _pow_exponent)
    ),
    "integer_pow": elementwise(
        "{0}**{y}", "", ("{y} * {0}**{less}", lambda a, y, n: _power(a, n)), uses=("y",)
    ),
    "square": elementwise("{0}**2", "", ("2 * {0}", lambda a, y: 2 * a)),
    "sqrt": elementwise("sqrt({0})", "", ("1 / (2 * sqrt({0}))", lambda a, y: 0.5 / y)),
    "rsqrt": elementwise("1 / sqrt({0})", "", ("(-{0}**(-3/2) / 2)", lambda a, y: -0.5 * y / a)),
    "abs": elementwise(
        "Abs({0})", "abs routes by the sign, at 0 as above it", ("sign({0})", lambda a, y: _sign(a))
    ),
    "sign": flat("sign({0})"),
    "floor": flat("floor({0})"),
    "ceil": flat("ceiling({0})"),
    "round": flat("round({0})"),
    "select_n": Gate(
        "where({0}, {2}, {1})",
        "select routes to the one chosen",
        ("", "{g} where chosen"),
        _select_back,
        lambda ts, xs, y, params, bind: bind(xs[0], *_filled(ts[1:], xs[1:])),
    ),
    "dot_general": Gate(
        "{0} @ {1}",
        "product: each side gets the other",
        ("{g} @ {1}^T", "{0}^T @ {g}"),
        _dot_back,
        _dot_push,
    ),
    "reduce_sum": rearrangement(
        "sum({0})", "sum copies the gradient to every term", "copies of {g}", _sum_back
    ),
    "reduce_max": _extreme("max({0})"),
    "reduce_min": _extreme("min({0})"),
    "broadcast_in_dim": rearrangement("copies of {0}", "copy adds", "sum of {g}", _broadcast_back),
    "reshape": rearrangement(
        "reshape({0})", _SHAPE, "{g} reshaped", lambda g, xs, params: [g.reshape(xs[0].shape)]
    ),
    "squeeze": rearrangement(
        "squeeze({0})", _SHAPE, "{g} reshaped", lambda g, xs, params: [g.reshape(xs[0].shape)]
    ),
    "transpose": rearrangement(
        "{0}^T",
        _SHAPE,
        "{g}^T",
        lambda g, xs, p: [jnp.transpose(g, [p["permutation"].index(i) for i in range(g.ndim)])],
    ),
    "concatenate": rearrangement(
        "concatenate({all})", "each part gets its own piece", "a piece of {g}", _concatenate_back
    ),
    "slice": rearrangement(
        "slice({0})", "0 for what was left out", "{g} in its place", _slice_back
    ),
    "rev": rearrangement(
        "reverse({0})", _SHAPE, "{g} reversed", lambda g, xs, p: [lax.rev(g, p["dimensions"])]
    ),
    "convert_element_type": rearrangement(
        "{0}", "another dtype", "{g}", lambda g, xs, p: [g.astype(xs[0].dtype)]
    ),
    "copy": rearrangement("{0}", "passes", "{g}", lambda g, xs, p: [g]),
    "stop_gradient": flat("stop({0})", "nothing passes"),
}
"""Gates by the names of JAX's primitives. What is not here goes by its own `jax.vjp`, and the
report says so."""


def is_differentiable(value: Any) -> bool:
    """Whether a gradient flows into a value.

    An array of floating-point (or, inside, complex) numbers.
    """
    return jnp.issubdtype(jax.typeof(value).dtype, jnp.inexact)
