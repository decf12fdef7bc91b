"""Extreme learning: random hidden blocks, and a last one by ridge regression. No error goes back.

    h_i = the last hidden block's output for example i;
    minimise over w, b:  sum_i |t_i - h_i w - b|^2 + penalty |w|^2

over the examples of all batches so far, whose normal equations are the state (`fnn.reservoir`). The
targets t are those of the loss, but labels become one-hot rows, and for a loss of bits, whose
outputs are logits with the boundary at 0, t is 2 t - 1. The outputs are least-squares fits of the
targets, for classes too: compare their accuracy, since as logits they are far too cautious.

`grads` is params - solution for the last block and 0 for the others: `optax.sgd(1.0)` sets the
block to the solution at every step. No other optimiser does. None that moves hidden weights (weight
decay) may be used, since the state holds their features. One epoch learns everything. Another adds
the same examples again: after E epochs the solution is that of penalty / E.

Source: Huang, Zhu, Siew (2006), doi:10.1016/j.neucom.2005.12.126 (by a pseudoinverse); lecture 003
(reservoir computing).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from optax import tree

from fnn import _validate
from fnn.backprop import check_net_and_loss
from fnn.nets.blocks import begins_with_dense, hidden_blocks
from fnn.reservoir import NormalEquations
from fnn.rules._blockwise import block_rule, targets_like
from fnn.types import Layer, Loss, Rule, by_recipe


@by_recipe
def extreme_learning(net: Layer, loss: Loss, *, penalty: float = 1e-2) -> Rule:
    """Random hidden blocks, and a last one in closed form.

    Train it by `optax.sgd(1.0)`, for one epoch.

    Args:
        net: a chain of at least two blocks, of which the last is one dense layer. What the hidden
            ones are drawn from decides what can be learned: see docs/rules.md.
        loss: any loss that takes its outputs; says what targets are, and measures the value, but is
            not what is minimised.
        penalty: of the squared weights, above 0, against a *sum* over examples.

    Returns:
        A rule whose state is the `NormalEquations` of the examples so far. Its value is the loss
        *before* the step, as of every rule.

    Raises:
        TypeError: `net` is no Layer, `loss` no Loss or `penalty` no number. ValueError: `penalty`
            is not above 0, `net` is one block, or its last block is more than a dense layer.

    Source: Huang, Zhu, Siew (2006), doi:10.1016/j.neucom.2005.12.126.

    >>> import fnn, jax, optax
    >>> net = fnn.mlp((1, 32, 1), "tanh", bias_init=jax.nn.initializers.normal(1.0))
    >>> x = jnp.linspace(-2, 2, 100)[:, None]
    >>> rule = extreme_learning(net, fnn.losses.l2_loss, penalty=1e-3)
    >>> settings = {"epochs": 1, "batch_size": 50, "key": jax.random.key(2)}
    >>> params, data = net.init(jax.random.key(1)), (x, jnp.sin(x))
    >>> params, history = fnn.fit(rule, optax.sgd(1.0), params, data, **settings)
    >>> fnn.evaluate(rule, params, data)["loss"] < 1e-4
    True
    """
    check_net_and_loss(net, loss)
    _validate.positive("penalty", penalty)
    chain = hidden_blocks("extreme_learning", net)
    _check_last(chain)

    def init(key, params):
        (last,) = chain.split(params)[-1]
        inputs, outputs = last.w.shape
        dtype = _validate.canonical_dtype(last.w)
        return NormalEquations.start(inputs, outputs, dtype)

    def gradients(batch, state):
        h, outputs = batch.hs[-2:]
        t = targets_like(outputs, loss, batch.targets)
        if loss.targets == "bits":
            t = 2 * t - 1
        weights = batch.weights
        if weights is not None:  # positions are examples
            positions = math.prod(h.shape[1:-1])
            weights = jnp.repeat(jnp.asarray(weights), positions)
        features = h.reshape(-1, h.shape[-1])
        targets = t.reshape(-1, t.shape[-1])
        state = state.add(features, targets, weights)
        (last,) = batch.params[-1]
        intercept = last.b is not None
        solution = state.solve(float(penalty), intercept=intercept)
        solution = tree.cast_like(solution, last)
        step = tree.sub(last, solution)
        still = tree.zeros_like(batch.params)
        step = tree.where(state.weight > 0, step, still[-1][0])  # else there are no examples yet
        return [*still[:-1], (step,)], state

    return block_rule("extreme_learning", net, loss, chain, init, gradients)


def _check_last(chain):
    """Raises unless the last block is one dense layer."""
    last = chain.layers[-1]
    if len(last.layers) > 1 or not begins_with_dense(last):
        came = ", ".join(map(str, last.layers))
        raise ValueError(
            f"the last block of `net` of extreme_learning must be one dense layer, got {came}: the "
            "rule solves for its weights. End the net with `fnn.dense(features, outputs)`, as "
            "`fnn.mlp` does."
        )
