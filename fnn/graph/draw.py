"""The graph as a picture: in DOT, the language of graphviz, or drawn by matplotlib."""

from __future__ import annotations

import html
import itertools
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fnn.graph.text import write_value

if TYPE_CHECKING:
    from fnn.graph.sweep import Graph, Node

VALUE = "#0072B2"  # colours that every kind of colour vision tells apart
GRADIENT = "#D55E00"
ROW = 0.85  # inches from row to row
FONT = 10  # points
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.75}
PADDING = 0.35 * FONT / 72  # inches around the text in a box


class Edge(NamedTuple):
    """An edge from a node to one that is computed from it."""

    start: Node
    end: Node
    value: str
    gradient: str  # what flows back over the edge; empty if nothing does


class Picture(NamedTuple):
    """Where everything stands, in inches: x to the right, y downward."""

    boxes: dict[Node, tuple[float, float]]  # the centre of each node's box
    lines: list[tuple[Edge, Any]]  # each edge with the corners of its line [corners, 2]
    size: tuple[float, float]


def _find_edges(graph):
    """Finds the edges of a graph with what they carry."""
    gradients = {}
    for flow in itertools.chain(*graph.try_sweep().flows.values()):
        gradients[flow.node, flow.place] = write_value(flow.gradient)
    return [
        Edge(source, node, write_value(source.value), gradients.get((node, place), ""))
        for node in graph.nodes
        for place, source in enumerate(node.inputs)
        if source.primitive != "constant"
    ]


def _write_label(graph, node):
    """Writes the text in a box: the node's name, what it does, and the value of a result."""
    value = write_value(node.value)
    if not node.inputs:
        return f"{node.name} = {value}"
    words = [source.name if source.primitive == "constant" else "" for source in node.inputs]
    words.insert(1, node.label)
    if node in graph.outputs:
        words.append(f"= {value}")
    return f"{node.name}: {' '.join(filter(None, words))}"


def write_dot(graph: Graph) -> str:
    """Writes the graph in DOT."""
    lines = ["digraph {", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
    names = {}
    for i, node in enumerate(graph.nodes):
        names[node] = f"n{i}"
        lines.append(f"  n{i} [label=<{html.escape(_write_label(graph, node))}>];")
    for edge in _find_edges(graph):
        label = f'<font color="{VALUE}">{html.escape(edge.value)}</font>'
        if edge.gradient:
            label += f'<br/><font color="{GRADIENT}">{edge.gradient}</font>'
        lines.append(f"  {names[edge.start]} -> {names[edge.end]} [label=<{label}>];")
    return "\n".join([*lines, "}\n"])


def save(graph: Graph, path: Path) -> Path:
    """Draws a graph with matplotlib into a file, and returns its path."""
    from matplotlib.figure import Figure

    picture = arrange(graph)
    width, height = picture.size
    fig = Figure(figsize=picture.size)
    axes = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.1, 0.15, "above each line its value, below it the gradient of the result")
    paint(axes, graph, picture)
    fig.savefig(path, dpi=min(150, 12000 / max(picture.size)))
    return path


def arrange(graph: Graph) -> Picture:
    """Places the boxes and lines of a graph, with room for the widest text on an edge."""
    edges = _find_edges(graph)
    columns, paths = _find_columns(graph.nodes, edges)
    rows = _find_rows(columns, paths)
    widths = [_measure(text) for edge in edges for text in (edge.value, edge.gradient)]
    gap = 0.3 + max([0.5, *widths])
    halves = {node: _measure(_write_label(graph, node)) / 2 + PADDING for node in graph.nodes}
    positions = {}
    right = 0.2
    top = min(rows.values())
    for _, points in sorted(columns.items()):
        widest = max(halves.get(point, 0.0) for point in points)
        for point in points:
            positions[point] = (right + widest, ROW * (rows[point] - top) + 0.4)
        right += 2 * widest + gap
    lines = []
    for edge, path in zip(edges, paths, strict=True):
        corners = np.array([positions[point] for point in path])
        corners[0, 0] += halves[edge.start]
        corners[-1, 0] -= halves[edge.end]
        lines.append((edge, corners))
    boxes = {node: positions[node] for node in graph.nodes}
    size = (right - gap + 0.2, ROW * (max(rows.values()) - top) + 0.8)
    return Picture(boxes, lines, size)


def _find_columns(nodes, edges):
    """Finds the points of each column, and those of each edge, one in every column from end to end.

    A node stands just left of the first node that uses it. Where an edge passes a column, the pair
    of the two is a point.
    """
    column = {}
    for node in reversed(nodes):
        ends = [column[edge.end] for edge in edges if edge.start is node]
        column[node] = min(ends, default=0) - 1
    columns = defaultdict(list)
    for node in nodes:
        columns[column[node]].append(node)
    paths = []
    for edge in edges:
        path = [edge.start]
        for passed in range(column[edge.start] + 1, column[edge.end]):
            path.append((edge, passed))
            columns[passed].append((edge, passed))
        paths.append([*path, edge.end])
    return columns, paths


def _find_rows(columns, paths):
    """Finds the row of each point, near the mean of its neighbours' rows.

    Sweeps over the columns from left to right and back. Points of a column stay a row apart.

    Source: Sugiyama, Tagawa, Toda (1981), doi:10.1109/TSMC.1981.4308636.
    """
    rows = {point: i for points in columns.values() for i, point in enumerate(points)}
    neighbours = defaultdict(list)
    for path in paths:
        for left, right in itertools.pairwise(path):
            neighbours[left, "right"].append(right)
            neighbours[right, "left"].append(left)
    for side in ("left", "right") * 12:
        for number in sorted(columns, reverse=side == "right"):
            wanted = {}
            for point in columns[number]:
                near = [rows[other] for other in neighbours[point, side]]
                wanted[point] = fmean(near or [rows[point]])
            rows |= _spread(wanted)
    return rows


def _spread(wanted):
    """Moves the points of a column a row apart, and keeps the mean of their rows."""
    points = sorted(wanted, key=wanted.__getitem__)
    heights = np.array(sorted(wanted.values()))
    steps = np.arange(len(points))
    rows = np.maximum.accumulate(heights - steps) + steps
    rows += np.mean(heights - rows)
    return dict(zip(points, rows.tolist(), strict=True))


def paint(axes: Any, graph: Graph, picture: Picture) -> None:
    """Draws a picture on matplotlib's axes, a unit an inch."""
    for edge, corners in picture.lines:
        _paint_edge(axes, edge, corners)
    for node, place in picture.boxes.items():
        box = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "white" if node.inputs else "#E8F1F8",
            "linewidth": 2.2 if node in graph.outputs else 1.0,
        }
        _write(axes, place, _write_label(graph, node), va="center", bbox=box)


def _paint_edge(axes, edge, corners):
    """Draws an arrow, and along its first piece the value above it and the gradient below."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    line = Path(corners)
    arrow = FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=FONT, color="#888888")
    axes.add_patch(arrow)
    middle = 0.55 * corners[0] + 0.45 * corners[1]
    dx, dy = corners[1] - corners[0]
    above = np.array([dy, -dx]) / math.hypot(dx, dy) / 24  # 3 points upward
    style = {
        "rotation": -math.degrees(math.atan2(dy, dx)),
        "rotation_mode": "anchor",
        "bbox": PAPER,
    }
    _write(axes, middle + above, edge.value, va="bottom", color=VALUE, **style)
    _write(axes, middle - above, edge.gradient, va="top", color=GRADIENT, **style)


def _write(axes, place, text, **style):
    """Writes a text at a place, with minus signs in place of hyphens."""
    text = text.replace("-", "−")
    axes.text(*place, text, ha="center", fontsize=FONT, parse_math=False, **style)


def _measure(text):
    """The width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=FONT)
    return text_to_path.get_text_width_height_descent(text, font, False)[0] / 72
