"""A graph as a picture.

DOT, and SVG or PNG by graphviz where it is installed or by matplotlib alone.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from fnn.graph import text as board
from fnn.graph.gates import is_differentiable
from fnn.graph.trace import Node, number

if TYPE_CHECKING:
    from fnn.graph.sweep import Graph

VALUE, GRADIENT = "#0072B2", "#D55E00"  # told apart by every kind of colour vision
_SIGNS = {
    "add": "+",
    "add_any": "+",
    "sub": "−",
    "mul": "×",
    "div": "÷",
    "neg": "−",
    "dot_general": "@",
    "reduce_sum": "Σ",
    "reduce_max": "max",
}
_SIGNS |= {
    "integer_pow": "^{y}",
    "square": "^2",
    "broadcast_in_dim": "copies",
    "transpose": "ᵀ",
    "logistic": "σ",
    "select_n": "select",
}
_SIGNS |= {"convert_element_type": "dtype", "stop_gradient": "stop"}
GAP, ROW = 0.8, 0.85  # inches: the least between boxes, and from row to row
FONT = 10  # points


class Edge(NamedTuple):
    """From a node to one that is made of it."""

    start: int
    end: int
    value: str
    gradient: str  # what flows back over this edge, or ""


def shown(graph: Graph) -> list[int]:
    """The nodes of a picture: inputs, results, and what a gradient can flow through.

    No numbers, no arithmetic of indices.
    """
    return [
        i
        for i, node in enumerate(graph.nodes)
        if i in graph.outputs
        or (
            not board.is_number(node)
            and (
                node.primitive == "input"
                or any(map(is_differentiable, jax.tree.leaves(node.value)))
            )
        )
    ]


def edges(graph: Graph) -> list[Edge]:
    """The edges between the nodes of a picture.

    What is not shown hands on the edges from what it is made of.
    """
    swept, _ = graph.swept
    flows = [[] for _ in graph.nodes] if swept is None else swept.flows
    back = {
        (i, f.node, f.place): number(f.gradient) for i, found in enumerate(flows) for f in found
    }
    visible, sources = set(shown(graph)), {}
    for i, node in enumerate(graph.nodes):
        sources[i] = [i] if i in visible else sorted({j for k in node.inputs for j in sources[k]})
    return [
        Edge(start, i, number(graph.nodes[j].value), back.get((j, i, place), ""))
        for i in sorted(visible)
        for place, j in enumerate(graph.nodes[i].inputs)
        for start in sources[j]
    ]


def label(graph: Graph, i: int) -> str:
    """What stands in a node: its name and what it does."""
    node = graph.nodes[i]
    if node.primitive in ("input", "constant"):
        return (
            f"{node.name} = {number(node.value)}"
            if node.value.ndim == 0
            else f"{node.name} {list(node.value.shape)}"
        )
    sign = (
        node.label
        if node.gate is None
        else _SIGNS.get(node.label, node.label).format(**board.numbers(node.params))
    )
    given = [graph.nodes[j].name if board.is_number(graph.nodes[j]) else "" for j in node.inputs]
    before, after = (given[0], given[1:]) if len(given) > 1 else ("", given)
    result = f" = {number(node.value)}" if i in graph.outputs and node.value.ndim == 0 else ""
    return f"{node.name}: {' '.join(part for part in (before, sign, *after) if part)}{result}"


def dot(graph: Graph) -> str:
    """The graph in DOT."""
    lines = [
        "digraph {",
        "  rankdir=LR;",
        '  node [shape=box, style=rounded, fontname="Helvetica"];',
        '  edge [fontname="Helvetica", fontsize=10];',
    ]
    for i in shown(graph):
        bold = ", penwidth=2" if i in graph.outputs else ""
        lines.append(f"  n{i} [label={_quoted(label(graph, i))}{bold}];")
    for edge in edges(graph):
        parts = [f'<font color="{VALUE}">{_escaped(edge.value)}</font>']
        parts += (
            [f'<font color="{GRADIENT}">{_escaped(edge.gradient)}</font>'] if edge.gradient else []
        )
        lines.append(f"  n{edge.start} -> n{edge.end} [label=<{'<br/>'.join(parts)}>];")
    return "\n".join([*lines, "}"]) + "\n"


def draw(graph: Graph, path: Path) -> Path:
    """Draws the graph, with graphviz where it is installed, else with matplotlib."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"`path` must end in .svg, .png or .pdf, got {str(path)!r}.")
    program = shutil.which("dot")
    if program is not None:
        subprocess.run(
            [
                program,
                f"-T{path.suffix[1:]}",
                "-Gdpi=150" if path.suffix == ".png" else "-Gdpi=72",
                "-o",
                str(path),
            ],
            input=dot(graph).encode(),
            check=True,
        )
        return path
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "`draw` needs graphviz or matplotlib. Install one: pip install matplotlib."
        ) from None
    _with_matplotlib(graph, path)
    return path


def layout(
    nodes: list[int], found: list[Edge]
) -> tuple[dict[int, tuple[int, float]], list[list[tuple[int, float]]]]:
    """Columns and heights of the nodes, and of the way of each edge.

    A node stands one column right of the last of its inputs, what is made of inputs alone just left
    of its first use. An edge over several columns takes a place in each of them, so that it goes
    around what stands there. Within a column, by the mean height of the neighbours.

    Source: Sugiyama, Tagawa, Toda (1981), doi:10.1109/TSMC.1981.4308636.
    """
    column = _columns(nodes, found)
    ways: list[list[Any]] = []
    for n, edge in enumerate(found):
        passing = [(n, c) for c in range(column[edge.start] + 1, column[edge.end])]
        ways.append([edge.start, *passing, edge.end])
    at: dict[Any, int] = column | {place: place[1] for way in ways for place in way[1:-1]}
    before: dict[Any, list[Any]] = {place: [] for place in at}
    after: dict[Any, list[Any]] = {place: [] for place in at}
    for way in ways:
        for left, right in itertools.pairwise(way):
            after[left].append(right)
            before[right].append(left)
    columns: dict[int, list[Any]] = {}
    for place, c in at.items():
        columns.setdefault(c, []).append(place)
    height = {
        place: float(k) for found_there in columns.values() for k, place in enumerate(found_there)
    }
    for sweep in range(24):
        neighbours = before if sweep % 2 == 0 else after
        for c in sorted(columns, reverse=bool(sweep % 2)):
            wanted = {p: _mean([height[j] for j in neighbours[p]], height[p]) for p in columns[c]}
            _spread(sorted(columns[c], key=lambda p: wanted[p]), wanted, height)
    return {i: (column[i], height[i]) for i in nodes}, [
        [(at[p], height[p]) for p in way] for way in ways
    ]


def _columns(nodes: list[int], found: list[Edge]) -> dict[int, int]:
    before: dict[int, list[int]] = {i: [] for i in nodes}
    after: dict[int, list[int]] = {i: [] for i in nodes}
    for edge in found:
        before[edge.end].append(edge.start)
        after[edge.start].append(edge.end)
    column: dict[int, int] = {}
    for i in nodes:
        column[i] = 1 + max((column[j] for j in before[i]), default=-1)
    for i in reversed(nodes):
        if after[i] and all(not before[j] and after[j] == [i] for j in before[i]):
            column[i] = min(column[j] for j in after[i]) - 1
    first = min(column.values())
    return {i: c - first for i, c in column.items()}


def _spread(order: list[Any], wanted: dict[Any, float], height: dict[Any, float]) -> None:
    """Puts nodes as near to where they want to be as one unit of distance between them allows."""
    for k, i in enumerate(order):
        height[i] = wanted[i] if k == 0 else max(wanted[i], height[order[k - 1]] + 1)
    shift = _mean([wanted[i] - height[i] for i in order], 0.0)
    for i in order:
        height[i] += shift


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


class Arranged(NamedTuple):
    """Where everything stands, in inches, x to the right and y downward."""

    centres: dict[int, tuple[float, float]]  # of the boxes
    halves: dict[int, float]  # their widths, halved
    ways: list[tuple[Edge, list[tuple[float, float]]]]
    size: tuple[float, float]


def arranged(graph: Graph) -> Arranged:
    """The layout of a graph in inches; between boxes there is room for the widest text on an edge."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    def width(text: str) -> float:
        return (
            text_to_path.get_text_width_height_descent(text, FontProperties(size=FONT), False)[0]
            / 72
        )

    nodes, found = shown(graph), edges(graph)
    at, ways = layout(nodes, found)
    # with the padding of `paint`
    half = {i: width(label(graph, i)) / 2 + 0.35 * FONT / 72 for i in nodes}
    gap = max([width(text) + 0.3 for edge in found for text in (edge.value, edge.gradient)] + [GAP])
    widest = [
        max(half[i] for i in nodes if at[i][0] == c)
        for c in range(1 + max(c for c, _ in at.values()))
    ]
    x = [sum(2 * w + gap for w in widest[:c]) + widest[c] + 0.2 for c in range(len(widest))]
    rows = [y for way in ways for _, y in way] + [y for _, y in at.values()]
    low, high = min(rows), max(rows)

    def place(c: int, y: float) -> tuple[float, float]:
        return x[c], ROW * (y - low) + 0.4

    lines = []
    for edge, way in zip(found, ways, strict=True):
        points = [place(c, y) for c, y in way]
        points[0] = points[0][0] + half[edge.start], points[0][1]
        points[-1] = points[-1][0] - half[edge.end], points[-1][1]
        lines.append((edge, points))
    return Arranged(
        {i: place(*at[i]) for i in nodes},
        half,
        lines,
        (x[-1] + widest[-1] + 0.2, ROW * (high - low) + 0.8),
    )


def paint(axes: Any, graph: Graph, found: Arranged) -> None:
    """Draws an arranged graph on matplotlib's axes, whose limits are to be set to its size."""
    for edge, points in found.ways:
        _draw_edge(axes, edge, points)
    for i, (x, y) in found.centres.items():
        thick = 2.2 if i in graph.outputs else 1.0
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": _colour(graph.nodes[i]),
            "edgecolor": "black",
            "linewidth": thick,
        }
        text = label(graph, i).replace("-", "−")
        axes.text(
            x,
            y,
            text,
            bbox=box,
            ha="center",
            va="center",
            fontsize=FONT,
            zorder=3,
            parse_math=False,
        )


def _with_matplotlib(graph: Graph, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = arranged(graph)
    width, height = found.size[0], found.size[1] + 0.3
    fig = Figure(figsize=(width, height))
    FigureCanvasAgg(fig)
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(found.size[1], -0.3))
    axes.axis("off")
    paint(axes, graph, found)
    axes.text(0.1, -0.1, "value", color=VALUE, fontsize=10, va="center", weight="bold")
    axes.text(
        0.65,
        -0.1,
        "gradient of the result",
        color=GRADIENT,
        fontsize=10,
        va="center",
        weight="bold",
    )
    fig.savefig(path, dpi=min(150, 12000 / max(width, height)))


def _draw_edge(axes: Any, edge: Edge, points: list[tuple[float, float]]) -> None:
    """A line with an arrow at its end.

    Along its beginning the value on one side of it and the gradient on the other.
    """
    axes.plot(
        *zip(*points, strict=True), color="#888888", linewidth=1, zorder=1, solid_joinstyle="round"
    )
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": "#888888", "shrinkA": 0, "shrinkB": 0},
        zorder=1,
    )
    (x0, y0), (x1, y1) = points[:2]
    dx, dy, length = x1 - x0, y1 - y0, math.hypot(x1 - x0, y1 - y0)
    share = 0.45 if len(points) == 2 else 0.5
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.75}
    turned = {
        "rotation": math.degrees(math.atan2(dy, dx)),
        "rotation_mode": "anchor",
        "transform_rotates_text": True,
        "ha": "center",
    }
    for text, colour, side, place in (
        (edge.value, VALUE, -1, "bottom"),
        (edge.gradient, GRADIENT, 1, "top"),
    ):
        if text:
            at = (
                x0 + share * dx - side * 0.04 * dy / length,
                y0 + share * dy + side * 0.04 * dx / length,
            )
            text = "0" if text == "-0" else text.replace("-", "−")
            axes.text(
                *at, text, color=colour, va=place, fontsize=FONT, bbox=paper, zorder=2, **turned
            )


def _colour(node: Node) -> str:
    return {"input": "#E8F1F8", "constant": "#F2F2F2"}.get(node.primitive, "white")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
