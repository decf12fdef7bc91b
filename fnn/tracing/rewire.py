"""Feedback alignment for any function: its jaxpr, evaluated with other matrices for the error.

A value of a jaxpr is a constant, made of parameters (and constants) alone, or depends on inputs.
What is made of parameters is computed twice: from the parameters, and from the feedback. Where it
meets a value that depends on inputs, in an equation `y = f(w, x)`, the derivative of `y` is

    dy = df/dw(w, x) dw + df/dx(B, x) dx

with B the feedback in the place of w, where backprop has `df/dx(w, x)`. Reverse mode transposes
this, so that the error of `x` goes back through B. Every other equation stays as it is.

What an equation is depends on how a function is written. `w * (x / norm(x))` carries the error back
through B alone. In `(w * x) / norm(x)` the quotient takes its derivative at `w * x`.

A function with its own derivative (`custom_jvp`, `custom_vjp`) and a `while` are one equation. The
evaluation goes on inside `jit`, `remat`, `scan` and `cond`, and keeps the last three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Literal, primitives
from jaxtyping import PyTree, Shaped

from fnn import _validate
from fnn.tracing.jaxprs import CALLS, apply_equation
from fnn.types import Array


class _Kind(IntEnum):
    """What a value is made of: the largest kind of what made it."""

    CONSTANT = 0
    PARAMS = 1
    INPUTS = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Value:
    """A value of a jaxpr.

    Attributes:
        actual: the value itself.
        feedback: what takes its place for the error of others, where the kind is `PARAMS`.
        kind: what it is made of; part of the structure of a tree.
    """

    actual: Any
    feedback: Any
    kind: _Kind = field(metadata={"static": True})


def rewire(apply: Callable[..., PyTree[Shaped[Array, "..."]]]) -> Callable[..., PyTree]:
    """The same function, with a derivative that carries the error back through other matrices.

    Args:
        apply: `(params, *inputs) -> outputs`, of one example: any function that JAX can trace.
            Inputs and outputs are trees; inputs may hold whole numbers and PRNG keys.

    Returns:
        `run(params, feedback, *inputs)`, which computes `apply(params, *inputs)`. `feedback` is a
        tree like the params. In the derivative, it takes their place wherever the error of
        something else goes through them. A parameter's own gradient is the usual one, given the
        error of what it made. So with `feedback = params` the derivative is the one of `apply`,
        and with random feedback it is feedback alignment. The derivative with respect to
        `feedback` is zero.

    Raises:
        TypeError: `apply` is no function. ValueError: at the call, `feedback` is no tree like
            `params`.

    Source: Lillicrap et al. (2016), doi:10.1038/ncomms13276.

    >>> run = rewire(lambda w, x: w * x)
    >>> [float(d) for d in jax.grad(run, (0, 1, 2))(2.0, 5.0, 3.0)]
    [3.0, 0.0, 5.0]
    """
    _validate.is_function("apply", apply, "`(params, *inputs) -> outputs`")

    def run(params, feedback, *inputs):
        _check_feedback(params, feedback)
        closed, shapes = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
        feedback = lax.stop_gradient(feedback)
        values = []
        for w, b in zip(jax.tree.leaves(params), jax.tree.leaves(feedback), strict=True):
            values.append(_Value(jnp.asarray(w), jnp.asarray(b), _Kind.PARAMS))
        for x in jax.tree.leaves(inputs):
            values.append(_Value(jnp.asarray(x), None, _Kind.INPUTS))
        outputs = _evaluate(closed, values)
        leaves = [jnp.asarray(output.actual) for output in outputs]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return run


def _check_feedback(params, feedback):
    """Raises a ValueError unless `feedback` is a tree like `params`, with equal shapes."""
    expected = _describe_leaves(params)
    came = _describe_leaves(feedback)
    for path in expected | came:
        leaf = expected.get(path, "no array")
        other = came.get(path, "no array")
        if leaf != other:
            raise ValueError(
                f"`feedback{path}` must be {leaf} as `params{path}` is, got {other}. "
                "Feedback is a tree like the params, such as other params of the same model."
            )
    tree = jax.tree.structure(params)
    other_tree = jax.tree.structure(feedback)
    if tree != other_tree:
        raise ValueError(f"`feedback` must be a tree like `params`, {tree}, got {other_tree}.")


def _describe_leaves(tree):
    """The dtype and shape of every leaf of a tree, by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        found[name] = _validate.describe(jax.typeof(leaf))
    return found


def _evaluate(closed, values):
    """The outputs of a jaxpr, given its inputs."""
    table = {}
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        table[variable] = _Value(value, None, _Kind.CONSTANT)
    table.update(zip(closed.jaxpr.invars, values, strict=True))

    def read(variable):
        if isinstance(variable, Literal):
            return _Value(variable.val, None, _Kind.CONSTANT)
        return table[variable]

    for eqn in closed.jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        results = _evaluate_equation(eqn, operands)
        table.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, closed.jaxpr.outvars))


def _evaluate_equation(eqn, operands):
    """The results of an equation, given its operands."""
    kinds = _read_kinds(operands)
    largest = max(kinds, default=_Kind.CONSTANT)
    if _Kind.PARAMS in kinds and largest == _Kind.INPUTS:
        rule = _RULES.get(eqn.primitive.name, _mix)
        return rule(eqn, operands)
    results = apply_equation(eqn, *_read_actual(operands))
    others = [None] * len(results)
    if largest == _Kind.PARAMS:
        others = apply_equation(eqn, *_read_feedback(operands))
    kinds = [largest] * len(results)
    return list(map(_Value, results, others, kinds))


def _read_actual(values):
    return [value.actual for value in values]


def _read_feedback(values):
    """The feedback in the place of what is made of parameters, and every other value itself."""
    return [value.actual if value.feedback is None else value.feedback for value in values]


def _raise_kinds(values, kinds):
    """The same values, as ones of kinds that are as large or larger.

    A constant is its own feedback.
    """
    raised = []
    for value, feedback, kind in zip(values, _read_feedback(values), kinds, strict=True):
        if kind != _Kind.PARAMS:
            feedback = None
        raised.append(_Value(value.actual, feedback, kind))
    return raised


def _read_kinds(values):
    return [value.kind for value in values]


def _mix(eqn, operands):
    """The results of an equation in which parameters meet what depends on inputs."""

    @jax.custom_jvp
    def mix(operands):
        return apply_equation(eqn, *_read_actual(operands))

    def differentiate(primals, tangents):
        (operands,) = primals
        own = {}
        through = {}
        for i, tangent in enumerate(tangents[0]):
            part = own if tangent.kind == _Kind.PARAMS else through
            if not isinstance(tangent.actual, SymbolicZero):
                part[i] = tangent.actual
        terms = []
        if own:
            terms.append(_push_forward(eqn, _read_actual(operands), own))
        if through:
            terms.append(_push_forward(eqn, _read_feedback(operands), through))
        results = apply_equation(eqn, *_read_actual(operands))
        return results, list(map(_add, *terms))

    mix.defjvp(differentiate, symbolic_zeros=True)
    return [_Value(result, None, _Kind.INPUTS) for result in mix(operands)]


def _push_forward(eqn, arrays, tangents):
    """The tangents of the results, given those of some operands by their position."""

    def apply(moved):
        operands = dict(enumerate(arrays)) | moved
        return apply_equation(eqn, *operands.values())

    primals = {i: arrays[i] for i in tangents}
    _, pushed = jax.jvp(apply, (primals,), (tangents,))
    return pushed


def _add(tangent, *more):
    """The sum of one or two tangents. Those of whole numbers are empty."""
    if not more or tangent.dtype == jax.dtypes.float0:
        return tangent
    (other,) = more
    return tangent + other


def _call(eqn, operands):
    """The results of a call, without the call."""
    body = eqn.params[CALLS[eqn.primitive.name]]
    return _evaluate(body, operands)


def _remat(eqn, operands):
    """The results of a function that is computed again in the backward pass."""
    body = ClosedJaxpr(eqn.params["jaxpr"], ())
    run = jax.checkpoint(
        partial(_evaluate, body),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    return run(operands)


def _switch(eqn, operands):
    """The results of the branch of a conditional that runs."""
    index, *operands = operands
    branches = eqn.params["branches"]
    found = [_find_kinds(branch, _read_kinds(operands)) for branch in branches]
    kinds = [max(index.kind, *column) for column in zip(*found, strict=True)]

    def run(branch, operands):
        outputs = _evaluate(branch, operands)
        return _raise_kinds(outputs, kinds)

    runs = [partial(run, branch) for branch in branches]
    return lax.switch(index.actual, runs, operands)


def _scan(eqn, operands):
    """The results of a scan whose body carries the feedback along."""
    body = eqn.params["jaxpr"]
    start = eqn.params["num_consts"]
    number = eqn.params["num_carry"]
    stop = start + number
    consts = operands[:start]
    kinds = _find_carry_kinds(body, _read_kinds(operands), start, stop)

    def step(carry, xs):
        outputs = _evaluate(body, [*consts, *carry, *xs])
        return _raise_kinds(outputs[:number], kinds), outputs[number:]

    carry, ys = lax.scan(
        step,
        _raise_kinds(operands[start:stop], kinds),
        operands[stop:],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return carry + ys


def _find_carry_kinds(body, kinds, start, stop):
    """The kinds of the carry of a scan, raised until the body returns no larger ones."""
    carry = kinds[start:stop]
    while True:
        found = _find_kinds(body, [*kinds[:start], *carry, *kinds[stop:]])
        raised = list(map(max, carry, found))  # the carry comes first
        if raised == carry:
            return carry
        carry = raised


def _find_kinds(closed, kinds):
    """The kinds of the outputs of a jaxpr, given those of its inputs."""
    constants = [_Value(aval, None, _Kind.CONSTANT) for aval in closed.in_avals]
    inputs = _raise_kinds(constants, kinds)
    outputs = jax.eval_shape(partial(_evaluate, closed), inputs)
    return _read_kinds(outputs)


_RULES = {
    primitives.jit_p.name: _call,
    primitives.closed_call_p.name: _call,
    primitives.remat_p.name: _remat,
    primitives.cond_p.name: _switch,
    primitives.scan_p.name: _scan,
}
"""How to evaluate an equation that holds a jaxpr."""
