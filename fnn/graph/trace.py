"""From a function to its graph: the jaxpr, evaluated equation by equation, calls inside opened up."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from fnn import _validate
from fnn.graph.gates import GATES, Gate, is_differentiable
from fnn.types import Array

CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass
class Node:
    """A value in the graph, and the primitive that gave it.

    Attributes:
        name: of a parameter, `z₁`, `z₂`, ... in the order of evaluation, or the number that a
            constant is.
        primitive: JAX's name of it; "input", "constant", or "part" (one of several outputs).
        inputs: numbers of the nodes that it is made of.
        value: an array; a tuple of them where the primitive has several outputs.
        params: of the primitive.
        bind: applies the primitive to arrays.
        depends: whether it depends on an argument.
        label: what the primitive is called on the board; the name of a function with a derivative
            of its own.
        real: whether no complex number goes in or comes out; the gates are those of real numbers.
    """

    name: str
    primitive: str
    inputs: tuple[int, ...]
    value: Any
    params: dict[str, Any] = field(default_factory=dict)
    bind: Callable[..., Any] | None = None
    real: bool = True
    depends: bool = True
    label: str = ""

    @property
    def gate(self) -> Gate | None:
        """What the primitive does to a gradient, or None if JAX's own `vjp` has to say."""
        return GATES.get(self.primitive) if self.real else None


def build(
    f: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[list[Node], list[int], list[int], Any]:
    """The nodes in the order of evaluation, the numbers of inputs and outputs, and the tree of the
    outputs."""
    _validate.is_function("f", f, "a function of arrays, such as `lambda x: x * x`")
    names, leaves = _named_leaves(f, args)
    closed, shapes = _jaxpr(f, args)
    walk = _Walk()
    inputs = [
        walk.add(Node(name, "input", (), leaf)) for name, leaf in zip(names, leaves, strict=True)
    ]
    walk.whole = {i for i in inputs if jnp.issubdtype(walk.nodes[i].value.dtype, jnp.integer)}
    outputs = walk.equations(closed, inputs)
    return *_pruned(walk.nodes, inputs, outputs), jax.tree.structure(shapes)


def _named_leaves(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[str], list[Any]]:
    try:
        bound = inspect.signature(f).bind(*args).arguments
    except ValueError:  # a builtin without a signature
        bound = {f"x{i}": arg for i, arg in enumerate(args)}
    except TypeError as error:
        raise TypeError(f"`f` does not take {len(args)} arguments: {error}.") from None
    found, leaves = [], []
    for name, value in bound.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            full = _with_subscript(name) + jax.tree_util.keystr(path)
            if not isinstance(leaf, (int, float, np.number, np.ndarray, jax.Array)) or isinstance(
                leaf, bool
            ):
                raise TypeError(
                    f"`{full}` must be a number or an array, got {leaf!r:.60} ({type(leaf).__name__}). "
                    "A setting? Close over it: `lambda x: f(x, ...)`."
                )
            found.append(full)
            leaves.append(_array(full, leaf))
    return found, leaves


def _array(name: str, leaf: Any) -> Array:
    """An argument as an array."""
    if hasattr(leaf, "dtype"):
        _validate.is_array(name, leaf)
    try:
        value = jnp.asarray(leaf)
    except OverflowError:
        raise ValueError(
            f"`{name}` is {leaf}, more than JAX's whole numbers hold. Pass a float, `{name}=float({leaf})`."
        ) from None
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` is complex; gates are those of real numbers. Pass its real and imaginary part as two arguments."
        )
    return value


def _with_subscript(name: str) -> str:
    """`x1` as it is written on the board."""
    letters = name.rstrip("0123456789")
    return letters + name[len(letters) :].translate(_SUBSCRIPTS) if letters else name


def _jaxpr(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[ClosedJaxpr, Any]:
    try:
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    ) as error:
        raise TypeError(
            "`f` uses a traced value as a Python number or in a Python `if` or `while`, so that its graph depends on the value. "
            f"Write `jnp.where` or `jax.lax.cond`, or close over what is fixed, `lambda x: f(x, 3)`. JAX says: {str(error).splitlines()[0]}"
        ) from None
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            f"`f` hands a traced value to NumPy. Use `jax.numpy` in its place. JAX says: {str(error).splitlines()[0]}"
        ) from None
    if not closed.jaxpr.outvars:
        raise TypeError("`f` returns no array, so that there is no graph of it.")
    return closed, shapes


class _Walk:
    """Evaluates equations and writes down a node for each."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.whole: set[int] = set()  # nodes of whole numbers that depend on an argument

    def add(self, node: Node) -> int:
        node.depends = node.primitive == "input" or any(self.nodes[i].depends for i in node.inputs)
        node.label = node.label or node.primitive
        self.nodes.append(node)
        return len(self.nodes) - 1

    def equations(self, closed: ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
        """The numbers of the outputs of a jaxpr whose inputs are these nodes."""
        jaxpr = closed.jaxpr
        constants = [self.constant(c) for c in closed.consts]
        at: dict[Any, int] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True)
        )

        def read(v: Any) -> int:
            return self.constant(v.val, v.aval) if isinstance(v, Literal) else at[v]

        for eqn in jaxpr.eqns:
            with eqn.ctx.manager:  # the dtypes and modes that `f` itself may have set
                inputs = tuple(read(v) for v in eqn.invars)
            at.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def constant(self, value: Any, aval: Any = None) -> int:
        value = jnp.asarray(value, None if aval is None else aval.dtype)
        name = number(value) if value.ndim == 0 else f"const{list(value.shape)}"
        return self.add(Node(name, "constant", (), value))

    def equation(self, eqn: Any, inputs: tuple[int, ...]) -> list[int]:
        """The numbers of what an equation gives.

        Its own node's, those inside a call, or its input's where it changes nothing.
        """
        values, name = [self.nodes[i].value for i in inputs], eqn.primitive.name
        params = eqn.primitive.get_bind_params(eqn.params)

        def bind(*xs: Array) -> Any:
            with eqn.ctx.manager:
                return eqn.primitive.bind(*xs, **params)

        if not eqn.outvars:  # a print for debugging
            return []
        inner = _inside(eqn)
        if inner is not None and (
            name not in CUSTOM
            or (name == "custom_jvp_call" and _same_derivative(bind, jaxpr_as_fun(inner), values))
        ):
            return self.equations(inner, inputs)
        if name == "convert_element_type":
            if values[0].dtype == eqn.params["new_dtype"]:
                return [inputs[0]]
            if inputs[0] in self.whole and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
                raise TypeError(
                    f"`{self._argument(inputs[0])}` holds whole numbers ({values[0].dtype}) that `f` takes as real ones, and a whole "
                    "number has no derivative. Pass floats, such as 2.0."
                )
        label = inner.jaxpr.debug_info.func_name if inner is not None else name
        several = eqn.primitive.multiple_results and len(eqn.outvars) > 1
        if eqn.primitive.multiple_results and not several:
            list_bind, bind = bind, lambda *xs: list_bind(*xs)[0]
        found = bind(*values)
        real = not any(
            jnp.issubdtype(v.dtype, jnp.complexfloating) for v in jax.tree.leaves((values, found))
        )
        outputs = [
            self.add(
                Node(
                    "",
                    name,
                    inputs,
                    tuple(found) if several else found,
                    eqn.params,
                    bind,
                    real,
                    label=label,
                )
            )
        ]
        if several:
            outputs = [
                self.add(Node("", "part", (outputs[0],), part, {"part": i}))
                for i, part in enumerate(found)
            ]
        if self.whole.intersection(inputs):
            self.whole |= {
                i for i in outputs if jnp.issubdtype(self.nodes[i].value.dtype, jnp.integer)
            }
        return outputs

    def _argument(self, i: int) -> str:
        """The name of the argument of whole numbers that a node is made of."""
        while self.nodes[i].primitive != "input":
            i = next(j for j in self.nodes[i].inputs if j in self.whole)
        return self.nodes[i].name


def _inside(eqn: Any) -> ClosedJaxpr | None:
    """The jaxpr of a call that is only a call."""
    if eqn.primitive.name not in (
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        *CUSTOM,
    ):
        return None
    found = next(
        (eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None
    )
    return ClosedJaxpr(found, ()) if found is not None and not hasattr(found, "consts") else found


def _same_derivative(
    rule: Callable[..., Any], inside: Callable[..., Any], values: list[Array]
) -> bool:
    """Whether a function with a derivative of its own has, here, that of what is inside.

    Along two directions, forward and backward.
    """
    rng = np.random.default_rng(0)

    def drawn(like: Any) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), like)

    try:
        for _ in range(2):
            floats, own = floating(lambda *xs: _inexact(rule(*xs)), values)
            opened = floating(lambda *xs: _inexact(inside(*xs)), values)[1]
            tangents, cotangents = drawn(floats), drawn(jax.eval_shape(own, *floats))
            forward = [jax.jvp(of, floats, tangents)[1] for of in (own, opened)]
            back = [jax.vjp(of, *floats)[1](cotangents) for of in (own, opened)]
            for ours, theirs in (
                (a, b)
                for pair in (forward, back)
                for a, b in zip(*map(jax.tree.leaves, pair), strict=True)
            ):
                if not _close(ours, theirs):
                    return False
    # whatever a rule or what is inside cannot do here: then it stays closed, and JAX sees to it
    except Exception:
        return False
    return True


def _inexact(outputs: Any) -> list[Array]:
    return [y for y in jax.tree.leaves(outputs) if is_differentiable(y)]


def _close(ours: Array, theirs: Array) -> bool:
    """Equal to rounding, zeros to zeros; what is not finite is not."""
    info = jnp.finfo(theirs.dtype)
    rounding = (16 if info.bits >= 32 else 4) * float(info.eps)
    a, b = (np.asarray(v).astype(np.float64) for v in (ours, theirs))
    if not (np.isfinite(a).all() and np.isfinite(b).all() and ((a == 0) == (b == 0)).all()):
        return False
    return bool((np.abs(a - b) <= rounding * (np.abs(b) + np.abs(b).max(initial=0))).all())


def floating(
    f: Callable[..., Any], values: Sequence[Array], takes: Sequence[bool] | None = None
) -> tuple[list[Array], Callable[..., Any]]:
    """The floating-point arrays among the values (of those, the ones that `takes` names), and `f`
    as a function of these alone."""
    places = [
        i for i, v in enumerate(values) if is_differentiable(v) and (takes is None or takes[i])
    ]

    def of(*floats: Array) -> Any:
        xs = list(values)
        for i, x in zip(places, floats, strict=True):
            xs[i] = x
        return f(*xs)

    return [values[i] for i in places], of


def what_depends(pull: Callable[..., Any], seeds: list[Any]) -> list[Any]:
    """`pull(seeds)`, with None for what does not depend on them.

    A pull is linear, and a 0 that is no result must not meet an infinity.
    """
    jaxpr = jax.make_jaxpr(pull)(seeds).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached |= set(eqn.outvars)
    return [
        g if not isinstance(v, Literal) and v in reached else None
        for v, g in zip(jaxpr.outvars, pull(seeds), strict=True)
    ]


def _pruned(
    nodes: list[Node], inputs: list[int], outputs: list[int]
) -> tuple[list[Node], list[int], list[int]]:
    """Without what the outputs do not depend on; named in the order of evaluation."""
    needed, todo = set(inputs), list(outputs)
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            todo += nodes[i].inputs
    kept = sorted(needed)
    new = {old: i for i, old in enumerate(kept)}
    taken = {nodes[i].name for i in inputs}
    free = (
        name for k in itertools.count(1) if (name := f"z{k}".translate(_SUBSCRIPTS)) not in taken
    )
    for i in kept:
        node = nodes[i]
        node.inputs = tuple(new[j] for j in node.inputs)
        node.name = node.name or next(free)
    return [nodes[i] for i in kept], [new[i] for i in inputs], [new[i] for i in outputs]


def number(value: Any) -> str:
    """A scalar in six digits; an array by its shape and norm."""
    if isinstance(value, tuple):
        return f"{len(value)} arrays"
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return f"{list(value.shape)} keys" if value.ndim else "key"
    if jnp.ndim(value) == 0:
        return f"{np.asarray(value).item():.6g}"
    if not is_differentiable(value):
        return f"{list(value.shape)} {value.dtype}"
    wide = np.complex128 if jnp.issubdtype(value.dtype, jnp.complexfloating) else np.float64
    return f"{list(value.shape)} |{np.linalg.norm(np.asarray(value).astype(wide)):.4g}|"
