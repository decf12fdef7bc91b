"""From a function to its graph: its jaxpr, evaluated equation by equation."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, primitives
from jaxtyping import PyTree, Shaped

from fnn import _validate
from fnn.graph.gates import find_gate
from fnn.graph.sweep import Graph, Node
from fnn.graph.text import write_value
from fnn.tracing.jaxprs import CALLS, apply_equation, open_jaxpr
from fnn.types import Array

CUSTOM = (primitives.custom_jvp_call_p.name, primitives.custom_vjp_call_p.name)
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def trace(f: Callable[..., PyTree[Shaped[Array, " ..."]]], *args: PyTree[Any]) -> Graph:
    """The computational graph of a function at a point, from its jaxpr; `f` stays as it is.

    Calls inside (`jit`, `remat`) are opened up. `scan`, `cond`, `while` and a function with its own
    derivative (`custom_jvp`, `custom_vjp`) are one node for each of their outputs. What does not
    depend on an argument is a constant.

    Args:
        f: a function of numbers, arrays and trees of them that JAX can trace.
        *args: the point. Whole numbers are for indices and labels only.

    Returns:
        The graph: `g.value`, `g.gradients()`, `g.jvp(*tangents)`, `print(g)`, `g.to_dot()`,
            `g.draw(path)`.

    Raises:
        TypeError: `f` is no function or JAX cannot trace it; an argument does not hold numbers.

    Source: lectures 000, 002, 003 (computational graphs, reverse-mode differentiation).

    >>> g = trace(lambda x1, x2: x1 * x2 + jnp.sin(x1), 2.0, 5.0)
    >>> [round(float(d), 6) for d in g.gradients()]
    [4.583853, 2.0]
    >>> print(g)
    forward
      x₁ = 2
      x₂ = 5
      z₁ = x₁ · x₂ = 10
      z₂ = sin(x₁) = 0.909297
      z₃ = z₁ + z₂ = 10.9093   the result
    backward, ∂u for the derivative of the result with respect to u
      ∂z₃ = 1
      ∂z₂ = ∂z₃ = 1   add distributes
      ∂z₁ = ∂z₃ = 1   add distributes
      ∂x₂ = ∂z₁ · x₁ = 2   mul swaps the multipliers
      ∂x₁ = ∂z₂ · cos(x₁) + ∂z₁ · x₂ = (-0.416147) + 5 = 4.58385   copy adds
    """
    _validate.is_function("f", f, "of arrays, such as `lambda x: x * x`")
    inputs = _read_arguments(f, args)
    closed, shapes = _make_jaxpr(f, args)
    nodes = list(inputs)
    outputs = _evaluate(closed.jaxpr, closed.consts, inputs, nodes)
    nodes += [node for node in outputs if node.primitive == "constant"]
    needed = {*inputs, *outputs}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.inputs)
    kept = [node for node in nodes if node in needed]
    _set_names(kept)
    arguments = jax.tree.structure(args)
    result = jax.tree.structure(shapes)
    return Graph(kept, inputs, outputs, arguments, result, jax.config.read("jax_enable_x64"))


def _read_arguments(f, args):
    """A node for each leaf of the arguments, named by the parameter and the path in it."""
    nodes = []
    for name, value in inspect.signature(f).bind(*args).arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            full = _write_subscript(name) + jax.tree_util.keystr(path)
            _validate.is_array(full, leaf if hasattr(leaf, "dtype") else np.asarray(leaf))
            nodes.append(Node("input", jnp.asarray(leaf), name=full))
    return nodes


def _make_jaxpr(f, args):
    """The jaxpr of a function and the tree of the shapes that it returns."""
    try:
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TypeError(
            "`f` uses a traced value as a Python number, in a Python `if` or `while`, or in NumPy. "
            "Write `jnp.where` or `jax.lax.cond`, use `jax.numpy`, or close over what is fixed: "
            f"`lambda x: f(x, 3)`. JAX says: {str(error).splitlines()[0]}"
        ) from None
    if not closed.jaxpr.outvars:
        raise TypeError("`f` returns no array, so there is no graph of it.")
    return closed, shapes


def _evaluate(jaxpr, consts, inputs, nodes):
    """The nodes of the outputs of a jaxpr; appends the nodes of its equations to `nodes`."""
    variables = [*jaxpr.invars, *jaxpr.constvars]
    found = dict(zip(variables, [*inputs, *map(_constant, consts)], strict=True))

    def read(variable):
        return _constant(variable.val) if isinstance(variable, Literal) else found[variable]

    for eqn in jaxpr.eqns:
        sources = [read(variable) for variable in eqn.invars]
        outputs = _evaluate_equation(eqn, sources, nodes)
        found.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _evaluate_equation(eqn, inputs, nodes):
    """The nodes of the outputs of an equation."""
    name = eqn.primitive.name
    if name in CALLS:
        jaxpr, consts = open_jaxpr(eqn.params[CALLS[name]])
        return _evaluate(jaxpr, consts, inputs, nodes)
    if name == "convert_element_type":
        _check_real(inputs[0], eqn.params["new_dtype"])
        if inputs[0].value.dtype == eqn.params["new_dtype"]:
            return inputs  # it only changes how the dtype is promoted
    values = [node.value for node in inputs]
    results = apply_equation(eqn, *values)
    if all(node.primitive == "constant" for node in inputs):
        return [_constant(value) for value in results]
    places = [place for place, node in enumerate(inputs) if node.is_variable]

    def apply(i, *point):
        moved = dict(enumerate(values)) | dict(zip(places, point, strict=True))
        return apply_equation(eqn, *moved.values())[i]

    gate = find_gate(name, eqn.params, values)
    label = name
    if gate:
        label = gate.symbol
    if name in CUSTOM:
        label = eqn.params["call_jaxpr"].jaxpr.debug_info.func_name
    outputs = []
    for i, value in enumerate(results):
        full = f"{label}[{i}]" if len(results) > 1 else label
        node = Node(name, value, inputs, places, partial(apply, i), gate, full)
        outputs.append(node)
    nodes.extend(outputs)
    return outputs


def _constant(value):
    """A node of a value that depends on no argument."""
    value = jnp.asarray(value)
    name = f"const{list(value.shape)}" if value.ndim > 0 else write_value(value)
    return Node("constant", value, name=name)


def _check_real(node, dtype):
    """Raises a TypeError if an argument of whole numbers is taken as one of real numbers."""
    is_whole = jnp.issubdtype(node.value.dtype, jnp.integer)
    becomes_real = jnp.issubdtype(dtype, jnp.inexact)
    if node.primitive == "input" and is_whole and becomes_real:
        raise TypeError(
            f"`{node.name}` holds whole numbers ({node.value.dtype}) that `f` takes as real ones, "
            "and a whole number has no derivative. Pass floats, such as 2.0."
        )


def _set_names(nodes):
    """Names the nodes without a name `z₁`, `z₂`, ..., apart from the names of arguments."""
    taken = {node.name for node in nodes}
    names = (_write_subscript(f"z{i}") for i in itertools.count(1))
    for node in nodes:
        node.name = node.name or next(name for name in names if name not in taken)


def _write_subscript(name):
    """`x1` as `x₁`."""
    stem = name.rstrip("0123456789")
    return stem + name[len(stem) :].translate(_SUBSCRIPTS)
