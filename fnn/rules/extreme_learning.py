"""Extreme learning: the hidden blocks stay as they were drawn, the last one is set by ridge
regression. No error goes back.

    h_i = the last hidden block's output for example i;    minimise over w, b:  sum_i |t_i - h_i w -
    b|^2 + penalty |w|^2

over the examples of all batches seen so far, whose normal equations are the state
(`fnn.reservoir`). The targets t are one-hot rows where the loss takes labels, 2 t - 1 for
`sigmoid_binary_cross_entropy`, whose outputs part the classes at 0, and else those of the loss. So
outputs are least-squares fits of the targets, for classes too: compare their accuracy, for as
logits they are far too cautious.

`grads` is params - solution for the last block and 0 for the others: `optax.sgd(1.0)` sets the
block to the solution at every step; no other optimiser does, and none that moves hidden weights
(weight decay) may be used, for the state remembers their features. One epoch is all that is to be
learned. In another the same examples are added again: after E of them the solution is that of
penalty / E.

Source: Huang, Zhu, Siew (2006), doi:10.1016/j.neucom.2005.12.126 (by a pseudoinverse); lecture 003
(reservoir computing).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import check_net_and_loss, weighted_mean
from fnn.nets.blocks import Blocks, begins_with_dense, hidden_blocks
from fnn.reservoir import NormalEquations
from fnn.rules._blockwise import block_pass
from fnn.types import Array, Key, Layer, Loss, Params, Rule


def extreme_learning(net: Layer, loss: Loss, *, penalty: float = 1e-2) -> Rule:
    """Random hidden blocks, and a last one in closed form.

    To be trained by `optax.sgd(1.0)`, for one epoch.

    Args:
        net: a chain of at least two blocks, of which the last is one dense layer. What the hidden
            ones are drawn from decides what can be
            learned: see docs/rules.md.
        loss: any loss that takes its outputs; says what targets are, and measures the value, but is
            not what is minimised.
        penalty: of the squared weights, above 0, against a *sum* over examples.

    Returns:
        A rule whose state is the `NormalEquations` of the examples seen. Its value is the loss
        *before* the step, as of every rule.

    Raises:
        TypeError: `net` is no Layer, `loss` no Loss or `penalty` no number. ValueError: `penalty`
            is not above 0, `net` is one block, or its last block is more than a dense layer.

    Source: Huang, Zhu, Siew (2006), doi:10.1016/j.neucom.2005.12.126.

    >>> import fnn, optax
    >>> net = fnn.mlp((1, 32, 1), "tanh", bias_init=jax.nn.initializers.normal(1.0))
    >>> x = jnp.linspace(-2, 2, 100)[:, None]
    >>> rule = extreme_learning(net, fnn.losses.l2_loss, penalty=1e-3)
    >>> settings = {"epochs": 1, "batch_size": 50, "key": jax.random.key(2)}
    >>> params, history = fnn.fit(rule, optax.sgd(1.0), net.init(jax.random.key(1)), (x, jnp.sin(x)), **settings)
    >>> fnn.evaluate(rule, params, (x, jnp.sin(x)))["loss"] < 1e-4
    True
    """
    check_net_and_loss(net, loss)
    _validate.positive("penalty", penalty)
    chain = hidden_blocks("extreme_learning", net)
    _check_last(chain)

    def init(key: Key, params: Params) -> NormalEquations:
        (last,) = chain.split(params)[-1]
        features, outputs = last.w.shape
        return NormalEquations.start(features, outputs, _validate.canonical_dtype(last.w))

    def value_and_grad(
        params: Params,
        state: NormalEquations,
        x: Array,
        targets: Array,
        weights: Array | None = None,
    ) -> tuple[Array, Params, NormalEquations]:
        parts, (*_, h, outputs), _, values, _ = block_pass(chain, params, loss, x, targets)
        each = (
            None
            if weights is None
            else jnp.broadcast_to(weights.reshape(-1, *(1,) * (h.ndim - 2)), h.shape[:-1]).reshape(
                -1
            )
        )
        state = state.add(_rows(h), _rows(_coded(loss, outputs, targets)), each)
        (last,) = parts[-1]
        solution = state.solve(float(penalty), intercept=last.b is not None)
        seen = state.weight > 0  # else nothing is known: the block stays
        step = jax.tree.map(
            lambda p, s: jnp.where(seen, p - s.astype(p.dtype), jnp.zeros_like(p)), last, solution
        )
        still = [jax.tree.map(jnp.zeros_like, part) for part in parts[:-1]]
        return weighted_mean(values, weights), chain.join([*still, (step,)]), state

    return Rule("extreme_learning", init, value_and_grad, net.apply, loss)


def _coded(loss: Loss, outputs: Array, targets: Array) -> Array:
    """What is regressed on, shaped and typed like the outputs."""
    t = jnp.asarray(targets)
    if t.ndim < outputs.ndim:  # labels: the loss has checked that nothing else is
        return jax.nn.one_hot(t, outputs.shape[-1], dtype=outputs.dtype)
    t = t.astype(outputs.dtype)
    return 2 * t - 1 if loss.name == "sigmoid_binary_cross_entropy" else t


def _rows(a: Array) -> Array:
    """Positions are examples: `[batch, ..., features]` as `[rows, features]`."""
    return a.reshape(-1, a.shape[-1])


def _check_last(chain: Blocks) -> None:
    """Raises unless the last block is one dense layer."""
    last = chain.layers[-1]
    if len(last.layers) != 1 or not begins_with_dense(last):
        came = ", ".join(layer.name for layer in last.layers)
        raise ValueError(
            f"the last block of `net` of extreme_learning must be one dense layer, got {came}: its weights are solved for, which what "
            "follows them would undo. End the net with `fnn.dense(features, outputs)`, as `fnn.mlp` does."
        )
