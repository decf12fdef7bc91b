"""The graph and its two sweeps.

The sweep backward gives all gradients at once. The sweep forward gives the derivative along one
direction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Inexact, PyTree, Shaped

from fnn import _validate
from fnn.graph import draw, text
from fnn.graph.gates import Gate, evaluate, is_differentiable
from fnn.types import Array


class NoGradientError(TypeError):
    """The result has no gradient: it is not one number, or a primitive has no reverse mode."""


@dataclass(eq=False, repr=False)
class Node:
    """A value in the graph and the primitive that computes it.

    Attributes:
        primitive: JAX's name of it; "input" or "constant" for a value that nothing computes.
        value: an array of any shape.
        inputs: the nodes that it is computed from.
        places: of the inputs that a gradient flows into.
        apply: computes the value from those of the inputs at `places`.
        gate: None where `jax.vjp` differentiates the primitive.
        label: the gate's symbol, or what the primitive is called: the function's name if it has its
            own derivative.
        name: of an argument, or `z₁`, `z₂`, ... in the order of evaluation, or a constant's number.
    """

    primitive: str
    value: Shaped[Array, " ..."]
    inputs: Sequence[Node] = ()
    places: Sequence[int] = ()
    apply: Callable[..., Any] = jnp.asarray
    gate: Gate | None = None
    label: str = ""
    name: str = ""

    @property
    def is_variable(self) -> bool:
        """Whether a gradient flows into it: it changes with an argument, and is no whole number."""
        changes = bool(self.places) or self.primitive == "input"
        return changes and is_differentiable(self.value)

    @property
    def point(self) -> list[Array]:
        """What `apply` takes."""
        return [self.inputs[place].value for place in self.places]


class Flow(NamedTuple):
    """The gradient that a node passes back to one of its inputs."""

    node: Node
    place: int  # of the input
    gradient: Inexact[Array, " ..."]  # the shape of the input


class Sweep(NamedTuple):
    """A sweep backward: for each node its gradient, and the flows that add up to it."""

    gradients: dict[Node, Array]
    flows: dict[Node, list[Flow]]
    reason: str = ""  # why there is no gradient, if so


@dataclass(frozen=True, repr=False)
class Graph:
    """The computational graph of a function at a point. `print` shows it gate by gate.

    Attributes:
        nodes: in the order of evaluation, without constants that formulas contain.
        inputs: the nodes of the leaves of the arguments.
        outputs: the nodes of the leaves of the result.
        arguments: the structure of the tuple of the arguments.
        result: the structure of the result.
        x64: whether the graph was traced with 64-bit numbers.
    """

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    arguments: Any
    result: Any
    x64: bool

    @property
    def value(self) -> PyTree[Shaped[Array, " ..."]]:
        """What the function returns."""
        return jax.tree.unflatten(self.result, [node.value for node in self.outputs])

    def gradients(self, cotangent: PyTree[Any] = None) -> tuple[Any, ...]:
        """The gradient by every argument, from one sweep backward.

        Args:
            cotangent: a tree like the result: the gradient by the result. May be left out where
                the result is one number; it is 1 then.

        Returns:
            One tree per argument, as `jax.grad` with all `argnums`. Whole numbers have zeros of
            dtype `float0`.

        Raises:
            TypeError: there is no cotangent and the result is not one floating-point number; a
                primitive has no reverse mode; or the cotangent is not like the result.
        """
        found = self.sweep(cotangent).gradients
        return _make_tree(self.arguments, self.inputs, found)

    def jvp(self, *tangents: PyTree[Any]) -> PyTree[Any]:
        """The derivative of the result along a direction, from one sweep forward.

        Args:
            *tangents: one tree per argument, each like it. Those of whole numbers have no effect.

        Returns:
            A tree like the result, as `jax.jvp`.

        Raises:
            TypeError: the tangents are not like the arguments; or a primitive has no forward mode.
        """
        with jax.enable_x64(self.x64):
            found = dict(_read_tree("tangents", tangents, self.arguments, self.inputs))
            for node in self.nodes:
                if node.places and node.is_variable:
                    direction = [found[node.inputs[place]] for place in node.places]
                    found[node] = jax.jvp(node.apply, node.point, direction)[1]
        return _make_tree(self.result, self.outputs, found)

    def sweep(self, cotangent: PyTree[Any] = None) -> Sweep:
        """From the last node to the first, each passes its gradient back to its inputs.

        Where several gradients reach a node, they add up.
        """
        gradients: dict[Node, Any] = defaultdict(int)
        flows: dict[Node, list[Flow]] = defaultdict(list)
        with jax.enable_x64(self.x64):
            if cotangent is None:
                cotangent = self._one()
            for node, seed in _read_tree("cotangent", cotangent, self.result, self.outputs):
                gradients[node] += seed
            for node in reversed(self.nodes):
                if node in gradients:
                    for flow in pull(node, gradients[node]):
                        source = node.inputs[flow.place]
                        flows[source].append(flow)
                        gradients[source] += flow.gradient
        return Sweep(gradients, flows)

    def try_sweep(self) -> Sweep:
        """The sweep from a result that is one number; an empty one with the reason if it is not."""
        try:
            return self.sweep()
        except NoGradientError as error:
            return Sweep({}, {}, str(error))

    def __str__(self) -> str:
        """The trace gate by gate."""
        return text.write(self)

    def to_dot(self) -> str:
        """The graph in DOT, the language of graphviz, with value and gradient on every edge."""
        return draw.write_dot(self)

    def draw(self, path: str | Path) -> Path:
        """Draws the graph with matplotlib, with value and gradient on every edge.

        Args:
            path: a file of a kind that matplotlib writes, such as .svg, .png or .pdf.

        Returns:
            The path.
        """
        return draw.save(self, Path(path))

    def _one(self):
        """The gradient of a result that is one number."""
        values = jax.tree.leaves(self.value)
        if len(values) != 1 or values[0].shape or not jnp.issubdtype(values[0].dtype, jnp.floating):
            raise NoGradientError(
                f"`f` returns {', '.join(map(_validate.describe, values))}, not one floating-point "
                "number. Pass floats, such as 2.0; or trace a function that returns one number, "
                "such as `lambda x: f(x).sum()`; or pass `cotangent`, a tree like the result."
            )
        return jax.tree.unflatten(self.result, [1.0])


def pull(node: Node, gradient: Inexact[Array, " ..."]) -> list[Flow]:
    """The gradients that a node passes back, given its own."""
    gate = node.gate
    if not node.places or (gate and not gate.back):
        return []
    if gate and gate.by_hand:
        values = [source.value for source in node.inputs]
        found = [
            _sum_to(values[place], evaluate(gate.back[place], values, gradient))
            for place in node.places
        ]
    else:
        found = _pull_by_jax(node, gradient)
    return [Flow(node, place, g) for place, g in zip(node.places, found, strict=True)]


def _pull_by_jax(node, gradient):
    """The gradients that `jax.vjp` passes back."""
    try:
        return jax.vjp(node.apply, *node.point)[1](gradient)
    except (ValueError, NotImplementedError) as error:
        raise NoGradientError(
            f"`{node.label}` ({node.name}) cannot be differentiated backward; "
            f"perhaps `jvp` goes forward. JAX says: {error}"
        ) from None


def _sum_to(value, gradient):
    """Sums a gradient over the axes along which a value was copied to meet more entries."""
    add = jax.linear_transpose(lambda x: jnp.broadcast_to(x, gradient.shape), value)
    return add(gradient)[0]


def _make_tree(structure, nodes, found):
    """A tree of what was found for some nodes, 0 where nothing was."""
    leaves = [found.get(node, zero_from_primal(node.value)) for node in nodes]
    return jax.tree.unflatten(structure, leaves)


def _read_tree(name, tree, structure, nodes):
    """Pairs the differentiable nodes with the leaves of a tree like their values."""
    leaves, found = jax.tree.flatten(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    expected = [node.value.shape for node in nodes]
    if found != structure or shapes != expected:
        raise TypeError(
            f"`{name}` must have the structure {structure} with the shapes {expected}, "
            f"got {found} with {shapes}."
        )
    return [
        (node, jnp.asarray(leaf, node.value.dtype))
        for node, leaf in zip(nodes, leaves, strict=True)
        if is_differentiable(node.value)
    ]
