"""Random nets, data and references that several tests share.

A case is a function of its number alone.

Its arrays are sent by `jax.device_put`: `jnp.asarray` compiles a program for every shape that it
has not seen (jax 0.10).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn import losses
from fnn.nets.activations import ACTIVATIONS
from fnn.types import Layer, Loss

# norm-wise relative error: rounding, with room for a deep net
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2}
SHAPES = ("serial", "residual", "repeat", "norm", "positions", "embedding", "tied")


def default_jit(f: Any) -> Any:
    """`jax.jit` with the optimisations that users have; conftest.py turns them off."""
    options = {}
    if "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    return jax.jit(f, compiler_options=options)


class Case(NamedTuple):
    """A net with a loss and a batch, in float64 where floating."""

    name: str
    net: Layer
    loss: Loss
    params: Any
    x: Any
    targets: Any
    weights: Any


def case(number: int, deepest: int = 6) -> Case:
    """The numbered net: an MLP of depth 1-6, or less deep, and what its shape adds.

    Width 1-48, batch 1-32. Most are shallow, since compilation is what the tests cost, and every
    layer takes its part of it.

    Every activation, loss and combinator comes up in turn.

    Call it inside `jax.enable_x64(True)`.
    """
    rng = np.random.default_rng(number)
    activation = ACTIVATIONS[number % len(ACTIVATIONS)]
    loss = losses.LOSSES[number // 2 % len(losses.LOSSES)]
    shape = SHAPES[number // 3 % len(SHAPES)]
    batch, depth = (
        int(rng.integers(1, 33)),
        int(rng.integers(1, rng.integers(1, deepest, endpoint=True), endpoint=True)),
    )
    widths = [int(w) for w in rng.integers(1, 49, depth + 1)]
    if shape == "norm":  # a layer_norm of one feature lets no gradient through
        widths[-1] = max(widths[-1], 2)
    net = _net(shape, widths, activation, rng)
    if depth == 1 and number % 2:  # else a net of one layer is without
        net = fnn.serial(net, activation)
    # its outputs are probabilities, here away from 0 and 1, where it is infinite
    if loss.name == "binary_cross_entropy":
        net = fnn.serial(net, fnn.activations.soft_sign, fnn.activations.sigmoid)
    if loss.name == "kl_divergence":  # its outputs are logarithms of probabilities
        net = fnn.serial(net, fnn.activations.log_sigmoid)
    params = _params(net, rng)
    positions = 2 if shape == "positions" else 3 if shape == "tied" and number % 2 else None
    x = _short(rng.normal(size=(batch, *(() if positions is None else (positions,)), widths[0])))
    if shape == "embedding":
        x = jax.device_put(rng.integers(0, 7, (batch, 3)).astype(np.int32))
    outputs = jax.eval_shape(net.apply, params, x)
    weights = (
        None if number % 4 else _short(rng.uniform(0.1, 2.0, batch) * (np.arange(batch) % 3 != 1))
    )
    name = f"{number}-{shape}-{activation.name}-{loss.name}-batch{batch}-{widths}"
    return Case(name, net, loss, params, x, targets_for(loss, outputs.shape, rng), weights)


def targets_for(loss: Loss, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Targets that the loss takes for outputs of that shape."""
    if loss.name == "softmax_cross_entropy_with_integer_labels":
        return jax.device_put(rng.integers(0, shape[-1], shape[:-1]).astype(np.int32))
    if loss.name in ("softmax_cross_entropy", "kl_divergence"):
        rows = rng.uniform(0.01, 1.0, shape)
        return _short(rows / rows.sum(-1, keepdims=True))
    if loss.name in ("sigmoid_binary_cross_entropy", "binary_cross_entropy"):
        return _short(rng.uniform(0.0, 1.0, shape))
    if loss.name == "hinge_loss":
        return jax.device_put(rng.choice([-1.0, 1.0], shape))
    return _short(rng.normal(size=shape))


def cast(tree: Any, dtype: Any) -> Any:
    """Every floating-point array of a tree in another dtype."""
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def array_shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all results in a jaxpr, loops and calls included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from array_shapes(inner)


def largest_array(f: Any, *arguments: Any) -> int:
    """How many numbers the largest array of a program has."""
    return max(map(math.prod, array_shapes(jax.make_jaxpr(f)(*arguments).jaxpr)))


def wide(tree: Any) -> list[np.ndarray]:
    """The leaves in NumPy's float64."""
    return [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]


def error(ours: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Norm-wise relative error over all leaves."""
    flat_ours, flat_reference = (
        np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (ours, reference)
    )
    difference, size = np.linalg.norm(flat_ours - flat_reference), np.linalg.norm(flat_reference)
    return 0.0 if difference == 0 else float(difference / size) if size else float("inf")


def _net(shape: str, widths: list[int], activation: Layer, rng: np.random.Generator) -> Layer:
    first, w = widths[0], widths[-1]
    plain = fnn.mlp(widths, activation)
    if shape == "serial" or shape == "positions":
        return plain
    if shape == "residual":
        return fnn.serial(fnn.residual(fnn.serial(fnn.dense(first, first), activation)), plain)
    if shape == "repeat":
        inner = fnn.residual(fnn.serial(fnn.dense(w, w), activation))
        return fnn.serial(
            plain,
            fnn.repeat(
                fnn.repeat(inner, 2) if rng.random() < 0.3 else inner, int(rng.integers(1, 5))
            ),
            fnn.dense(w, w),
        )
    if shape == "norm":
        return fnn.serial(
            plain,
            fnn.layer_norm(w),
            fnn.dense(w, w + 1, bias_init=None),
            fnn.rms_norm(w + 1),
            activation,
        )
    if shape == "tied":
        return fnn.serial(plain, _tied(w, activation, rng), fnn.dense(w, w))
    return fnn.serial(fnn.embedding(7, first), plain)


def _tied(width: int, activation: Layer, rng: np.random.Generator) -> Layer:
    """One to four uses of the same block, by itself, in each layer of a `repeat`, or each use a
    `repeat` of its own."""
    block = fnn.residual(fnn.serial(fnn.dense(width, width), activation, fnn.rms_norm(width)))
    n, nesting = int(rng.integers(1, 5)), rng.integers(3)
    if nesting == 1:
        return fnn.repeat(fnn.iterate(block, n), 2)
    return fnn.iterate(fnn.repeat(block, 2) if nesting == 2 else block, n)


def _params(net: Layer, rng: np.random.Generator) -> Any:
    """Parameters of the size that initialisers give, with no bias at 0 and no scale at 1.

    No gradient hides behind them.
    """

    def draw(path: Any, leaf: Any) -> Any:
        last, noise = jax.tree_util.keystr(path[-1:]), rng.normal(size=leaf.shape)
        return _short(
            noise * np.sqrt(2 / leaf.shape[-2])
            if last == ".w"
            else (last == ".scale") + 0.1 * noise
        )

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0))
    )


def _short(a: np.ndarray) -> Any:
    """Float64 numbers that bfloat16 holds exactly, so that a cast to another dtype is the same
    case."""
    return jax.device_put(a.astype(jnp.bfloat16).astype(np.float64))
