"""The graph in words: the formula of every node and the products that add up to its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from fnn.graph.gates import bracket, is_differentiable
from fnn.types import Array

if TYPE_CHECKING:
    from fnn.graph.sweep import Graph, Node


def write(graph: Graph) -> str:
    """Writes the trace gate by gate: each node's value, then each gradient."""
    lines = ["forward"]
    for node in graph.nodes:
        formula = f"{write_formula(node)} = " if node.inputs else ""
        end = "   the result" if node in graph.outputs else ""
        lines.append(f"  {node.name} = {formula}{write_value(node.value)}{end}")
    sweep = graph.try_sweep()
    if sweep.reason:
        return "\n".join([*lines, f"no sweep backward: {sweep.reason}"])
    lines.append("backward, ∂u for the derivative of the result with respect to u")
    for node in reversed(graph.nodes):
        if node in sweep.gradients:
            lines.append(_write_gradient(node, sweep))
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
    if node.gate:
        return _fill(node.gate.formula, node)
    return f"{node.label}({', '.join(bracket(source.name) for source in node.inputs)})"


def _write_gradient(node, sweep):
    """`∂x₁ = ∂z₂ · cos(x₁) + ∂z₁ · x₂ = (-0.416147) + 5 = 4.58385   copy adds`."""
    gradient = sweep.gradients[node]
    parts = [f"  ∂{node.name}", write_value(gradient)]
    word = ""
    flows = sweep.flows[node]
    if flows:
        parts.insert(1, " + ".join(map(_write_flow, flows)))
        gate = flows[0].node.gate
        word = gate.word if gate else ""
    if len(flows) > 1:
        word = "copy adds"
        if gradient.ndim == 0:
            numbers = [bracket(write_value(flow.gradient)) for flow in flows]
            parts.insert(2, " + ".join(numbers))
    return f"{' = '.join(parts)}   {word}".rstrip()


def _write_flow(flow):
    """`∂z₂ · cos(x₁)`."""
    gate = flow.node.gate
    above = f"∂{flow.node.name}"
    if not gate:
        return f"vjp of {flow.node.label} at {above}"
    product = _fill(gate.back[flow.place], flow.node, above)
    if gate.by_hand and flow.gradient.shape != flow.node.value.shape:
        return f"sum of {product}"
    return product


def _fill(formula, node, above=""):
    """A formula of a gate with the names of its inputs, as it is written by hand."""
    names = [bracket(source.name) for source in node.inputs]
    formula = formula.format(*names, g=above).replace(" * ", " · ")
    return formula.replace("**", "^").replace("^T", "ᵀ")
