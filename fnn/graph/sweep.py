"""The graph with its two sweeps.

Backward, which gives every gradient at once, and forward, one direction at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import _validate
from fnn.graph import draw as drawing
from fnn.graph import text as board
from fnn.graph.gates import is_differentiable
from fnn.graph.trace import Node, build, floating, what_depends
from fnn.types import Array


class NoReverseError(ValueError):
    """A primitive that JAX cannot differentiate backward."""


class NoForwardError(TypeError):
    """A primitive that JAX cannot differentiate forward."""


class NoNumberError(TypeError):
    """The result is not one floating-point number, so that there is no gradient of it."""


class Flow(NamedTuple):
    """What flows back over one edge."""

    node: int  # that gives it
    place: int  # which of that node's inputs
    gradient: Array


class Sweep(NamedTuple):
    """A reverse sweep: of every node the gradient, and what it is the sum of."""

    # an array, a tuple of them for a node of several outputs, None where nothing flows
    gradients: list[Any]
    flows: list[list[Flow]]


class Graph:
    """The computational graph of a function at a point. `print` it for the trace gate by gate.

    Attributes:
        nodes: `Node`s in the order of evaluation.
        inputs: the numbers of the nodes that are leaves of the arguments.
        outputs: those of the leaves of the result.
    """

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.nodes: list[Node]
        self.nodes, self.inputs, self.outputs, self._out = build(f, args)
        self._args = args
        self._x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]  # the precision of the values

    @property
    def value(self) -> Any:
        """What the function returns."""
        return jax.tree.unflatten(self._out, [self.nodes[i].value for i in self.outputs])

    @cached_property
    def swept(self) -> tuple[Sweep | None, str]:
        """The sweep backward from a result that is one number; or None, and why there is none."""
        try:
            return self.sweep(), ""
        except (NoReverseError, NoNumberError) as error:
            return None, str(error)

    @property
    def untabled(self) -> list[Node]:
        """The nodes whose primitive is not among the gates: their gradient is by JAX's own `vjp`."""
        return [
            n
            for n in self.nodes
            if n.gate is None
            and n.primitive not in ("input", "constant", "part")
            and any(map(is_differentiable, jax.tree.leaves(n.value)))
            and any(
                is_differentiable(v) for i in n.inputs for v in jax.tree.leaves(self.nodes[i].value)
            )
        ]

    def _in_its_precision(self) -> Any:
        """A graph that was traced in float64 is swept in it."""
        return jax.enable_x64(self._x64)

    def gradients(self, cotangent: Any = None) -> tuple[Any, ...]:
        """The gradient with respect to every argument, by one sweep backward.

        Args:
            cotangent: a tree like the result, where that is not one number: the gradient of what is
                made of it.

        Returns:
            A tuple with one tree per argument, as `jax.grad` with all `argnums`. Whole numbers have
            zeros of `float0`.

        Raises:
            TypeError, ValueError: the result is a tree or not one floating-point number, and there
                is no cotangent; or that is not like the result.
        """
        swept = self.sweep(cotangent)
        with self._in_its_precision():
            found = [self._as_input(i, swept.gradients[i]) for i in self.inputs]
        return jax.tree.unflatten(jax.tree.structure(self._args), found)

    def jvp(self, *tangents: Any) -> Any:
        """The tangent of the result: its derivative along one direction, by one sweep forward.

        Args:
            *tangents: one tree per argument; for whole numbers anything of that structure.

        Returns:
            A tree like the result.
        """
        if jax.tree.structure(tangents) != jax.tree.structure(self._args):
            raise TypeError(
                f"`tangents` must be one per argument, each like it: {_layout(self._args)}; got {_layout(tangents)}."
            )
        with self._in_its_precision():
            return self._tangents(jax.tree.leaves(tangents))

    def _tangents(self, tangents: list[Any]) -> Any:
        found: list[Any] = [None] * len(self.nodes)
        for i, t in zip(self.inputs, tangents, strict=True):
            found[i] = (
                self._like("tangents", t, self.nodes[i])
                if is_differentiable(self.nodes[i].value)
                else None
            )
        for i, node in enumerate(self.nodes):
            if node.primitive != "input":
                found[i] = self._pushed(node, found)
        leaves = [
            jnp.zeros_like(self.nodes[i].value) if found[i] is None else found[i]
            for i in self.outputs
        ]
        return jax.tree.unflatten(self._out, leaves)

    def sweep(self, cotangent: Any = None) -> Sweep:
        """The reverse sweep: from the last node to the first, each hands its gradient on to its
        inputs; where several flow, they add up."""
        with self._in_its_precision():
            return self._backward(cotangent)

    def _backward(self, cotangent: Any) -> Sweep:
        flows: list[list[Flow]] = [[] for _ in self.nodes]
        gradients: list[Any] = [None] * len(self.nodes)
        for i, seed in zip(self.outputs, self._seeds(cotangent), strict=True):
            gradients[i] = seed if gradients[i] is None or seed is None else gradients[i] + seed
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            for flow in flows[i]:
                gradients[i] = self._added(node, gradients[i], flow)
            if gradients[i] is None or not node.inputs:
                continue
            for place, g in enumerate(self._pulled(node, gradients[i])):
                if g is not None:
                    flows[node.inputs[place]].append(Flow(i, place, g))
        return Sweep(gradients, flows)

    def __str__(self) -> str:
        return board.text(self)

    def to_dot(self) -> str:
        """The graph in DOT, graphviz's language, with value and gradient on every edge."""
        return drawing.dot(self)

    def draw(self, path: str | Path) -> Path:
        """Draws the graph with value and gradient on every edge, with graphviz where it is
        installed, else with matplotlib.

        Args:
            path: a .svg, .png or .pdf file.

        Returns:
            The path.
        """
        return drawing.draw(self, Path(path))

    def _one_number(self) -> Array:
        """The result, where it is one floating-point number."""
        if not jax.tree_util.treedef_is_leaf(self._out):
            raise NoNumberError(
                f"`f` returns a tree of {len(self.outputs)} arrays, and not one number. Pass `cotangent`, a tree like it, or trace a "
                "function that picks one."
            )
        y = self.nodes[self.outputs[0]].value
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise NoNumberError(
                f"`f` returns {y.dtype}, which has no gradient. Are the arguments whole numbers? Pass floats, such as 2.0."
            )
        if y.ndim:
            raise NoNumberError(
                f"`f` returns an array of shape {tuple(y.shape)}, and not one number. Pass `cotangent` of that shape, "
                "or trace `lambda x: f(x).sum()`."
            )
        return y

    def _seeds(self, cotangent: Any) -> list[Any]:
        nodes = [self.nodes[i] for i in self.outputs]
        if cotangent is None:
            return [jnp.ones_like(self._one_number())]
        if jax.tree.structure(cotangent) != self._out:
            raise TypeError(
                f"`cotangent` must be a tree like the result, {_layout(self.value)}; got {_layout(cotangent)}."
            )
        return [
            self._like("cotangent", c, n) if is_differentiable(n.value) else None
            for c, n in zip(jax.tree.leaves(cotangent), nodes, strict=True)
        ]

    def _like(self, name: str, given: Any, node: Node) -> Array:
        given = np.asarray(given) if not hasattr(given, "dtype") else given
        _validate.is_array(name, given)
        if given.shape != node.value.shape:
            raise ValueError(
                f"`{name}` has shape {given.shape} for {node.name}, expected {tuple(node.value.shape)}."
            )
        if jnp.issubdtype(given.dtype, jnp.complexfloating) and not jnp.issubdtype(
            node.value.dtype, jnp.complexfloating
        ):
            raise TypeError(f"`{name}` for {node.name} is complex, expected {node.value.dtype}.")
        return jnp.asarray(given).astype(node.value.dtype)

    def _as_input(self, i: int, gradient: Any) -> Any:
        value = self.nodes[i].value
        if not is_differentiable(value):
            return np.zeros(value.shape, jax.dtypes.float0)
        return jnp.zeros_like(value) if gradient is None else gradient

    def _added(self, node: Node, so_far: Any, flow: Flow) -> Any:
        if not isinstance(node.value, tuple):
            return flow.gradient if so_far is None else so_far + flow.gradient
        parts = list(so_far) if so_far is not None else [None] * len(node.value)
        part = self.nodes[flow.node].params["part"]
        parts[part] = flow.gradient if parts[part] is None else parts[part] + flow.gradient
        return tuple(parts)

    def _pulled(self, node: Node, upstream: Any) -> list[Any]:
        """What a node hands to each of its inputs."""
        if node.primitive == "part":
            return [upstream]
        values = [self.nodes[i].value for i in node.inputs]
        takes = [
            is_differentiable(v) and self.nodes[i].depends
            for i, v in zip(node.inputs, values, strict=True)
        ]
        if not any(takes):
            return [None] * len(values)
        if node.gate is not None:
            if not is_differentiable(node.value):
                return [None] * len(values)
            found = node.gate.back(upstream, values, node.value, node.params, takes)
            return [g if take else None for g, take in zip(found, takes, strict=True)]
        return self._pulled_by_jax(node, values, takes, upstream)

    def _pulled_by_jax(
        self, node: Node, values: list[Array], takes: list[bool], upstream: Any
    ) -> list[Any]:
        seeds = list(upstream) if isinstance(node.value, tuple) else [upstream]
        used = [k for k, seed in enumerate(seeds) if seed is not None]
        floats, of = floating(
            lambda *xs: [jax.tree.leaves(_bound(node)(*xs))[k] for k in used], values, takes
        )
        try:
            found = iter(what_depends(jax.vjp(of, *floats)[1], [seeds[k] for k in used]))
        except (ValueError, NotImplementedError) as error:
            raise NoReverseError(
                f"`{node.label}` ({node.name}) cannot be differentiated backward; perhaps `jvp` goes forward. JAX says: {error}"
            ) from None
        return [next(found) if take else None for take in takes]

    def _pushed(self, node: Node, tangents: list[Any]) -> Any:
        """The tangent of a node from those of its inputs; None where nothing moves."""
        if node.primitive == "part":
            whole = tangents[node.inputs[0]]
            return (
                None
                if whole is None or not is_differentiable(node.value)
                else whole[node.params["part"]]
            )
        values = [self.nodes[i].value for i in node.inputs]
        given = [
            tangents[i] if is_differentiable(v) else None
            for i, v in zip(node.inputs, values, strict=True)
        ]
        moves = [t is not None for t in given]
        if not any(moves) or not any(map(is_differentiable, jax.tree.leaves(node.value))):
            return None
        if node.gate is not None:
            return node.gate.push(given, values, node.value, node.params, _bound(node))
        floats, of = floating(_bound(node), values, moves)
        try:
            return jax.jvp(of, tuple(floats), tuple(t for t in given if t is not None))[1]
        except (TypeError, ValueError, NotImplementedError) as error:
            raise NoForwardError(
                f"`{node.label}` ({node.name}) cannot be differentiated forward; perhaps `gradients` goes backward. JAX says: {error}"
            ) from None


def _layout(tree: Any) -> str:
    """How a tree is built, with a star for every leaf."""
    return str(jax.tree.structure(tree)).removeprefix("PyTreeDef(").removesuffix(")")


def _bound(node: Node) -> Callable[..., Any]:
    """A primitive as a function; that of several outputs gives a tuple."""
    assert node.bind is not None
    bind = node.bind
    return (lambda *xs: tuple(bind(*xs))) if isinstance(node.value, tuple) else bind


def trace(f: Callable[..., Any], *args: Any) -> Graph:
    """The computational graph of a function at a point, from its jaxpr: nobody rewrites `f`.

    Calls inside (`jit`, `custom_jvp`, `remat`) are opened up, unless a derivative of their own
    differs, at this point, from that of what is inside. `scan`, `cond` and `while` are one node
    each.

    Args:
        f: a function of numbers, arrays and trees of them, that JAX can trace.
        *args: the point. Whole numbers are for indices and labels only.

    Returns:
        The graph: `g.value`, `g.gradients()`, `g.jvp(*tangents)`, `print(g)`, `g.to_dot()`,
            `g.draw(path)`.

    Raises:
        TypeError: `f` is no function or cannot be traced; an argument is no number or array, or
            holds whole numbers that are taken as real ones.

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
    return Graph(f, args)
