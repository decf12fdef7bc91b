"""The graph in words: the formula of every node and the products that add up to its gradient."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from fnn.graph.gates import bracket, is_differentiable
from fnn.types import Array

if TYPE_CHECKING:
    from fnn.graph.sweep import Flow, Graph, Node


def write(graph: Graph) -> str:
    """Writes the trace gate by gate: each node's value, then each gradient."""
    lines = ["forward"]
    for node in graph.nodes:
        line = f"  {node.name} = "
        if node.inputs:
            line += f"{write_formula(node)} = "
        line += write_value(node.value)
        if node in graph.outputs:
            line += "   the result"
        lines.append(line)
    sweep = graph.try_sweep()
    if sweep.reason:
        lines.append(f"no sweep backward: {sweep.reason}")
        return "\n".join(lines)
    lines.append("backward, ∂u for the derivative of the result with respect to u")
    for node in reversed(graph.nodes):
        if node in sweep.gradients:
            gradient = sweep.gradients[node]
            lines.append(_write_gradient(node, gradient, sweep.flows[node]))
    flows = itertools.chain(*sweep.flows.values())
    labels = [flow.node.label for flow in flows if flow.node.gate is None]
    for label in dict.fromkeys(labels):
        lines.append(f"{label} is not among the gates; its gradient is by jax.vjp")
    return "\n".join(lines)


def write_value(value: Shaped[Array, " ..."]) -> str:
    """Writes a number in six digits, an array by its shape and norm."""
    shape = list(value.shape)
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not shape and not is_key:
        return f"{value.item() + 0.0:.6g}"  # + 0.0 turns -0 into 0
    if not is_differentiable(value):
        return f"{shape} {value.dtype}"
    norm = np.linalg.norm(np.abs(value).astype(np.float64))
    return f"{shape} |{norm:.4g}|"


def write_formula(node: Node) -> str:
    """Writes how a node is computed from its inputs."""
    names = _input_names(node)
    if node.gate is None:
        return f"{node.label}({', '.join(names)})"
    return _typeset(node.gate.formula.format(*names))


def _write_gradient(
    node: Node,
    gradient: Array,
    flows: list[Flow],
) -> str:
    """`∂x₁ = ∂z₂ · cos(x₁) + ∂z₁ · x₂ = (-0.416147) + 5 = 4.58385   copy adds`."""
    parts = [f"  ∂{node.name}"]
    word = ""
    for flow in flows:
        if flow.node.gate is not None:
            word = flow.node.gate.word
    if flows:
        products = [_write_flow(flow) for flow in flows]
        parts.append(" + ".join(products))
    if len(flows) > 1:
        word = "copy adds"
        if gradient.ndim == 0:
            numbers = [bracket(write_value(flow.gradient)) for flow in flows]
            parts.append(" + ".join(numbers))
    parts.append(write_value(gradient))
    return f"{' = '.join(parts)}   {word}".rstrip()


def _write_flow(flow: Flow) -> str:
    """`∂z₂ · cos(x₁)`."""
    node = flow.node
    above = f"∂{node.name}"
    if node.gate is None:
        return f"vjp of {node.label} at {above}"
    back = node.gate.back[flow.place]
    product = _typeset(back.format(*_input_names(node), g=above))
    if node.gate.by_hand and flow.gradient.shape != node.value.shape:
        return f"sum of {product}"
    return product


def _input_names(node: Node) -> list[str]:
    """The names of a node's inputs, negative numbers in brackets."""
    return [bracket(source.name) for source in node.inputs]


def _typeset(formula: str) -> str:
    """A formula of Python as it is written by hand."""
    formula = formula.replace(" * ", " · ")
    return formula.replace("**", "^").replace("^T", "ᵀ")
