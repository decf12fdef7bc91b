"""The graph as a picture: in DOT, the language of graphviz, or drawn by matplotlib."""

from __future__ import annotations

import html
import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fnn.graph.text import write_value

if TYPE_CHECKING:
    from fnn.graph.sweep import Graph, Node

VALUE = "#0072B2"  # colours that every kind of colour vision tells apart
GRADIENT = "#D55E00"
ROW = 0.85  # inches from row to row
FONT = 10  # points
PAPER = {  # behind the text on an edge
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 0.3,
    "alpha": 0.75,
}
PADDING = 0.35 * FONT / 72  # inches around the text in a box


class Edge(NamedTuple):
    """An edge from a node to one that is computed from it."""

    start: Node
    end: Node
    value: str
    gradient: str  # what flows back over the edge; empty if nothing does


class Picture(NamedTuple):
    """Where everything stands, in inches: x to the right, y downward."""

    boxes: dict[Any, tuple[float, float]]  # the centre of each node's box
    lines: list[tuple[Edge, list[Any]]]  # each edge with the corners of its line
    size: tuple[float, float]


Point: TypeAlias = "tuple[int, Node | Edge]"  # a column, and what stands in it or passes through it


def find_edges(graph: Graph) -> list[Edge]:
    """Finds the edges of a graph with what they carry."""
    flows = itertools.chain(*graph.try_sweep().flows.values())
    gradients = {(flow.node, flow.place): write_value(flow.gradient) for flow in flows}
    edges = []
    for node in graph.nodes:
        for place, source in enumerate(node.inputs):
            if source.primitive != "constant":
                edge = Edge(
                    source,
                    node,
                    write_value(source.value),
                    gradients.get((node, place), ""),
                )
                edges.append(edge)
    return edges


def write_label(graph: Graph, node: Node) -> str:
    """Writes the text in a box: the node's name, what it does, and the value of a result."""
    value = write_value(node.value)
    if not node.inputs:
        return f"{node.name} = {value}"
    constants = [source.name if source.primitive == "constant" else "" for source in node.inputs]
    parts = [f"{node.name}:", constants[0], node.label, *constants[1:]]
    if node in graph.outputs:
        parts.append(f"= {value}")
    return " ".join(part for part in parts if part)


def write_dot(graph: Graph) -> str:
    """Writes the graph in DOT."""
    lines = [
        "digraph {",
        "  rankdir=LR;",
        "  node [shape=box, style=rounded];",
    ]
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    for node, i in numbers.items():
        label = html.escape(write_label(graph, node))
        lines.append(f"  n{i} [label=<{label}>];")
    for edge in find_edges(graph):
        label = f'<font color="{VALUE}">{html.escape(edge.value)}</font>'
        if edge.gradient:
            label += f'<br/><font color="{GRADIENT}">{edge.gradient}</font>'
        start = numbers[edge.start]
        end = numbers[edge.end]
        lines.append(f"  n{start} -> n{end} [label=<{label}>];")
    lines.append("}\n")
    return "\n".join(lines)


def save(graph: Graph, path: Path) -> Path:
    """Draws a graph with matplotlib into a file, and returns its path."""
    from matplotlib.figure import Figure

    picture = arrange(graph)
    width, height = picture.size
    fig = Figure(figsize=picture.size)
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.1, 0.15, "above each line its value, below it the gradient of the result")
    paint(axes, graph, picture)
    fig.savefig(path, dpi=min(150, 12000 / max(picture.size)))
    return path


def arrange(graph: Graph) -> Picture:
    """Places the boxes and lines of a graph, with room for the widest text on an edge."""
    edges = find_edges(graph)
    halves: dict[Any, float] = {}  # half the width of each box
    for node in graph.nodes:
        halves[node] = measure(write_label(graph, node)) / 2 + PADDING
    texts = [text for edge in edges for text in (edge.value, edge.gradient)]
    gap = 0.3 + max([0.5, *map(measure, texts)])
    paths = find_paths(graph.nodes, edges)
    rows = find_rows(paths)
    widest: dict[int, float] = defaultdict(float)
    for column, key in rows:
        widest[column] = max(widest[column], halves.get(key, 0.0))
    x = {}
    right = 0.2
    for column in sorted(widest):
        x[column] = right + widest[column]
        right += 2 * widest[column] + gap
    positions = {}
    for point, row in rows.items():
        positions[point] = (x[point[0]], ROW * row + 0.4)
    lines = []
    for edge, path in zip(edges, paths[len(halves) :], strict=True):
        corners = [np.array(positions[point]) for point in path]
        corners[0][0] += halves[edge.start]
        corners[-1][0] -= halves[edge.end]
        lines.append((edge, corners))
    boxes = {key: position for (_, key), position in positions.items() if key in halves}
    size = (right - gap + 0.2, ROW * max(rows.values()) + 0.8)
    return Picture(boxes, lines, size)


def find_paths(nodes: list[Node], edges: list[Edge]) -> list[list[Point]]:
    """Finds the points of each node, one, and of each edge, one in every column that it crosses.

    A node stands just left of the first node that uses it.
    """
    column: dict[Node, int] = {}
    for node in reversed(nodes):
        users = [column[edge.end] for edge in edges if edge.start is node]
        column[node] = min(users, default=0) - 1
    paths: list[list[Point]] = [[(column[node], node)] for node in nodes]
    for edge in edges:
        start = column[edge.start]
        end = column[edge.end]
        passing = [(between, edge) for between in range(start + 1, end)]
        paths.append([(start, edge.start), *passing, (end, edge.end)])
    return paths


def find_rows(paths: list[list[Point]]) -> dict[Point, float]:
    """Finds the row of each point, near the mean of its neighbours' rows.

    Sweeps over the columns from left to right and back. Points of a column stay a row apart.

    Source: Sugiyama, Tagawa, Toda (1981), doi:10.1109/TSMC.1981.4308636.
    """
    before = defaultdict(list)
    after = defaultdict(list)
    for path in paths:
        for left, right in itertools.pairwise(path):
            after[left].append(right)
            before[right].append(left)
    columns: dict[int, list[Point]] = defaultdict(list)
    rows: dict[Point, float] = {}
    for point in dict.fromkeys(itertools.chain(*paths)):
        rows[point] = len(columns[point[0]])
        columns[point[0]].append(point)
    forward = sorted(columns)
    for order, neighbours in [(forward, before), (forward[::-1], after)] * 12:
        for column in order:
            wanted = {}
            for point in columns[column]:
                near = [rows[other] for other in neighbours[point]] or [rows[point]]
                wanted[point] = sum(near) / len(near)
            rows |= spread(wanted)
    top = min(rows.values())
    return {point: row - top for point, row in rows.items()}


def spread(wanted: dict[Point, float]) -> dict[Point, float]:
    """Moves the points of a column a row apart, and keeps the mean of their rows."""
    points = sorted(wanted, key=lambda point: wanted[point])
    heights = np.array([wanted[point] for point in points])
    steps = np.arange(len(points))
    rows = np.maximum.accumulate(heights - steps) + steps
    rows += np.mean(heights - rows)
    return dict(zip(points, rows.tolist(), strict=True))


def paint(axes: Any, graph: Graph, picture: Picture) -> None:
    """Draws a picture on matplotlib's axes, a unit an inch."""
    for edge, corners in picture.lines:
        _paint_edge(axes, edge, corners)
    for node, (x, y) in picture.boxes.items():
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "white" if node.inputs else "#E8F1F8",
            "linewidth": 2.2 if node in graph.outputs else 1.0,
        }
        axes.text(
            x,
            y,
            _typeset(write_label(graph, node)),
            bbox=box,
            ha="center",
            va="center",
            fontsize=FONT,
            parse_math=False,
        )


def _paint_edge(axes: Any, edge: Edge, corners: list[Any]) -> None:
    """Draws an arrow, and along its first piece the value above it and the gradient below."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    arrow = FancyArrowPatch(
        path=Path(corners),
        arrowstyle="-|>",
        mutation_scale=FONT,
        color="#888888",
    )
    axes.add_patch(arrow)
    middle = 0.55 * corners[0] + 0.45 * corners[1]
    dx, dy = corners[1] - corners[0]
    above = 3 * np.array([dy, dx]) / math.hypot(dx, dy)  # points, upward
    style: dict[str, Any] = {
        "rotation": math.degrees(math.atan2(-dy, dx)),
        "rotation_mode": "anchor",
        "textcoords": "offset points",
        "ha": "center",
        "fontsize": FONT,
        "bbox": PAPER,
    }
    axes.annotate(
        _typeset(edge.value),
        middle,
        above,
        va="bottom",
        color=VALUE,
        **style,
    )
    axes.annotate(
        _typeset(edge.gradient),
        middle,
        -above,
        va="top",
        color=GRADIENT,
        **style,
    )


def measure(text: str) -> float:
    """The width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=FONT)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return width / 72


def _typeset(text: str) -> str:
    """A text with minus signs in place of hyphens."""
    return text.replace("-", "−")
