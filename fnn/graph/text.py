"""A graph in words: the formula of every node, and the products that its gradient is the sum of, as
a lecturer writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from fnn.graph.gates import is_differentiable
from fnn.graph.trace import Node, number

if TYPE_CHECKING:
    from fnn.graph.sweep import Flow, Graph


def text(graph: Graph) -> str:
    """The trace gate by gate: each node's value, then each gradient."""
    lines = ["forward"]
    last = graph.nodes[graph.outputs[-1]].primitive != "input" and len(graph.outputs) == 1
    for i, node in enumerate(graph.nodes):
        if not is_number(node):
            made = "" if node.primitive in ("input", "constant") else f"{formula(graph, i)} = "
            lines.append(
                f"  {node.name} = {made}{number(node.value)}{'   the result' if last and i == graph.outputs[0] else ''}"
            )
    lines += [
        f"  {graph.nodes[i].name}   the result" for i in graph.outputs if is_number(graph.nodes[i])
    ]
    swept, why = graph.swept
    if swept is None:
        return "\n".join([*lines, f"no sweep backward: {why}"])
    lines.append("backward, ∂u for the derivative of the result with respect to u")
    for i in reversed(range(len(graph.nodes))):
        gradient = swept.gradients[i]
        if gradient is None and i in graph.inputs and is_differentiable(graph.nodes[i].value):
            gradient = jnp.zeros_like(graph.nodes[i].value)
        if (
            gradient is not None
            and not is_number(graph.nodes[i])
            and graph.nodes[i].primitive != "constant"
        ):
            lines.append(
                f"  ∂{graph.nodes[i].name} = {products(graph, swept.flows[i])}{number(gradient)}{_word(graph, swept.flows[i])}"
            )
    lines += [
        f"{n.name}: {n.label} is not among the gates; its gradient is by jax.vjp"
        for n in graph.untabled
    ]
    return "\n".join(lines)


def is_number(node: Node) -> bool:
    """A constant that is written where it is used."""
    return node.primitive == "constant" and node.value.ndim == 0 and node.name != "key"


def formula(graph: Graph, i: int) -> str:
    """How a node is made of its inputs."""
    node = graph.nodes[i]
    names = operands(graph, node)
    if node.primitive == "part":
        return f"{names[0]}[{node.params['part']}]"
    if node.gate is None:
        return f"{node.label}({', '.join(names)})"
    return _otherwise(graph, node, names) or pretty(
        node.gate.text.format(*names, all=", ".join(names), **numbers(node.params))
    )


def back(graph: Graph, flow: Flow) -> str:
    """What flows back over an edge, as a product: `∂z₂ · cos(x₁)`."""
    node = graph.nodes[flow.node]
    upstream, names = f"∂{node.name}", operands(graph, node)
    if node.primitive == "part":
        return upstream
    if node.gate is None:
        return f"vjp of {node.label} at {upstream}"
    if node.primitive == "dot_general" and not _is_matrix_product(node):
        a, b, out = _letters(graph, node)
        mine, other = (a, b) if flow.place == 0 else (b, a)
        return f"einsum({out},{other}->{mine}: {upstream}, {names[1 - flow.place]})"
    template = node.gate.partials[min(flow.place, len(node.gate.partials) - 1)]
    text = pretty(template.format(*names, g=upstream, **numbers(node.params)))
    if "{g}" in template:
        return text
    product = upstream if text == "1" else f"{upstream} · {text}"
    stretched = graph.nodes[node.inputs[flow.place]].value.shape != node.value.shape
    return f"sum of {product}" if stretched else product


def _otherwise(graph: Graph, node: Node, names: list[str]) -> str:
    """What the table's one text does not fit, in words of its own; or nothing."""
    if node.primitive == "dot_general" and not _is_matrix_product(node):
        a, b, out = _letters(graph, node)
        return f"einsum({a},{b}->{out}: {', '.join(names)})"
    if node.primitive == "select_n" and len(names) > 3:
        return f"select({', '.join(names)})"
    if node.primitive == "transpose" and node.value.ndim != 2:
        return f"transpose({names[0]}, {tuple(node.params['permutation'])})"
    if node.primitive == "convert_element_type" and not is_differentiable(node.value):
        return f"{node.value.dtype}({names[0]})"
    return ""


def _is_matrix_product(node: Node) -> bool:
    return node.params["dimension_numbers"] == (((1,), (0,)), ((), ())) and node.value.ndim == 2


def _letters(graph: Graph, node: Node) -> tuple[str, str, str]:
    """The axes of both sides of a product and of the result, as `einsum` writes them."""
    (over_a, over_b), (batch_a, batch_b) = node.params["dimension_numbers"]
    letters = iter("ijklmnopqrstuvwxyzabcdefgh")
    a = [next(letters) for _ in range(graph.nodes[node.inputs[0]].value.ndim)]
    of_b = {j: a[i] for i, j in zip((*over_a, *batch_a), (*over_b, *batch_b), strict=True)}
    b = [
        of_b[j] if j in of_b else next(letters)
        for j in range(graph.nodes[node.inputs[1]].value.ndim)
    ]
    batch = [a[i] for i in batch_a]
    free = [c for i, c in enumerate(a) if i not in (*over_a, *batch_a)] + [
        c for j, c in enumerate(b) if j not in of_b
    ]
    return "".join(a), "".join(b), "".join(batch + free)


def products(graph: Graph, flows: list[Flow]) -> str:
    """`∂z₂ · cos(x₁) + ∂z₁ · x₂ = `, and the terms as numbers where there are several."""
    if not flows:
        return ""
    line = " + ".join(back(graph, flow) for flow in flows)
    if len(flows) > 1 and all(f.gradient.ndim == 0 for f in flows):
        line += " = " + " + ".join(_bracketed(number(f.gradient)) for f in flows)
    return f"{line} = "


def _word(graph: Graph, flows: list[Flow]) -> str:
    if len(flows) > 1:
        return "   copy adds"
    gate = graph.nodes[flows[0].node].gate if flows else None
    return f"   {gate.word}" if gate is not None and gate.word else ""


def operands(graph: Graph, node: Node) -> list[str]:
    """The names of a node's inputs; a negative number in brackets."""
    return [_bracketed(graph.nodes[j].name) for j in node.inputs]


def _bracketed(name: str) -> str:
    return f"({name})" if name.startswith("-") else name


def numbers(params: dict[str, Any]) -> dict[str, Any]:
    """The numbers among a primitive's parameters, and one less than an exponent."""
    found = {key: value for key, value in params.items() if isinstance(value, int)}
    found |= {"less": found["y"] - 1} if "y" in found else {}
    return {key: f"({value})" if value < 0 else value for key, value in found.items()}


def pretty(line: str) -> str:
    """A formula in sympy's terms as it stands on the board."""
    for old, new in (
        (" * ", " · "),
        ("**", "^"),
        ("Max(", "max("),
        ("Min(", "min("),
        ("Abs(", "abs("),
        ("sqrt(pi)", "sqrt(π)"),
        ("^T", "ᵀ"),
    ):
        line = line.replace(old, new)
    return line.removesuffix("^1")
