"""Feedback alignment: the error goes back through other matrices than the weights.

    dz_L = dE/dz_L,    dz_l = (dz_{l+1} B_{l+1}^T) (.) f'(z_l),
    dw_l = h_{l-1}^T dz_l,    db_l = sum over the batch of dz_l

which is backprop with B_l in the place of w_l. A `Feedback` says what B is. It is a tree like the
parameters. A layer uses the part that carries its error back: a dense layer `w`, a norm its scale.

- `fixed`: drawn once, as the net draws its own start. Lillicrap et al. (2016),
  doi:10.1038/ncomms13276.
- `sign_symmetric`: sign(w) (.) M, with M one number for each leaf (uSF), |drawn once| (frSF) or
  |drawn at every step| (brSF). Liao, Leibo, Poggio (2016), arXiv:1510.05067; Moskovitz,
  Litwin-Kumar, Abbott (2018), arXiv:1812.06488.
- `kolen_pollack`: takes the step that w takes, and both decay. Kolen, Pollack (1994),
  doi:10.1109/ICNN.1994.374486; Akrout et al. (2019), arXiv:1904.05391.
- `weight_mirror`: grows by noise^T z, where z is the response of a layer to noise. Akrout et al.
  (2019).

Lecture 003 shows a fixed random Jacobian in the place of w: this rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from optax import tree

from fnn import _validate
from fnn.backprop import check_net_and_loss
from fnn.backprop import value_and_grad as backpropagate
from fnn.nets.blocks import begins_with_linear, blocks
from fnn.rules._blockwise import LocalRule, block_pass
from fnn.rules.backprop import warn_if_flat
from fnn.types import ByRecipe, Key, Layer, Loss, Params, State, by_recipe

Draw = Callable[[Key], Params]
Magnitude = Literal["uniform", "fixed", "redrawn"]


@dataclass(frozen=True, eq=False)
class Feedback(ByRecipe):
    """Where feedback matrices come from.

    Attributes:
        name: what tables call it.
        init: `(net, key, params) -> state`.
        step: `(net, state, params, x) -> (B, state)`: what the error goes back through now, and the
            state for the next step.
    """

    init: Callable[..., State]
    step: Callable[..., tuple[Params, State]]


@by_recipe
def feedback_alignment(net: Layer, loss: Loss, *, feedback: str | Feedback = "fixed") -> LocalRule:
    """Backprop's gradient with the error carried back by feedback matrices.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        feedback: a name out of `FEEDBACKS`, or a `Feedback`: `sign_symmetric("redrawn")`,
            `kolen_pollack(1e-3)`, ...

    Returns:
        A rule. With `fixed`, its state is B itself: put the parameters in its place, and it is
        backprop.

    Raises:
        TypeError, ValueError: an argument is invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> state, x, targets = rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    """
    check_net_and_loss(net, loss)
    warn_if_flat("feedback_alignment", net)
    if not isinstance(feedback, Feedback):
        _validate.one_of("feedback", feedback, FEEDBACKS)
        feedback = FEEDBACKS[feedback]
    step = feedback.step
    chain = blocks(net)

    def value_and_grad(params, state, x, targets, weights=None):
        b, state = step(net, state, params, x)

        def backward(params, residuals, dy):
            return net.backward(b, residuals, dy)

        carried = backpropagate(replace(net, backward=backward), loss)
        value, grads = carried(params, x, targets, weights)
        return value, grads, state

    def matrices(params, state, x):
        b, _ = step(net, state, params, x)
        return b

    def signals(params, state, x, targets):
        batch = block_pass(chain, loss, params, x, targets)
        b = chain.split(matrices(params, state, x))
        batch = batch._replace(params=b)
        dy = batch.error
        dys = [dy]
        for i in reversed(range(1, len(b))):
            _, dy = batch.backward(i, dy)
            dys.insert(0, dy)
        return dys

    name = f"feedback_alignment({feedback.name})".replace("(fixed)", "")
    init = partial(feedback.init, net)
    return LocalRule(name, init, value_and_grad, net.apply, loss, signals, matrices)


@by_recipe
def random_feedback(draw: Draw | None = None) -> Feedback:
    """B is drawn once and never changes.

    Args:
        draw: `(key) -> tree like the params`, such as the `init` of the same net with another
            `kernel_init`; the net's own, if None.

    >>> random_feedback().name
    'fixed'
    """

    def step(net, state, params, x):
        return state, state

    return Feedback("fixed", partial(_draw, draw), step)


@by_recipe
def sign_symmetric(magnitude: Magnitude = "uniform", draw: Draw | None = None) -> Feedback:
    """B has the signs of w.

    Args:
        magnitude: `"uniform"`, the root mean square of each leaf as the net draws it; `"fixed"`,
            sizes drawn once; `"redrawn"`, sizes drawn at every step.
        draw: what draws the sizes, as for `random_feedback`.

    Raises:
        ValueError: the magnitude is none of these.

    >>> sign_symmetric("redrawn").name
    'sign_symmetric redrawn'
    """
    _validate.one_of("magnitude", magnitude, get_args(Magnitude))

    def init(net, key, params):
        if magnitude == "redrawn":
            return key
        sizes = _draw(draw, net, key, params)
        if magnitude == "fixed":
            return sizes
        return jax.tree.map(lambda b: jnp.sqrt(jnp.mean(b**2)), sizes)

    def step(net, state, params, x):
        sizes = state
        if magnitude == "redrawn":
            state, key = jax.random.split(state)
            sizes = _draw(draw, net, key, params)
        b = jax.tree.map(lambda w, size: jnp.sign(w) * jnp.abs(size), params, sizes)
        return b, state

    name = f"sign_symmetric {magnitude}".removesuffix(" uniform")
    return Feedback(name, init, step)


@by_recipe
def kolen_pollack(decay: float = 1.5e-3, draw: Draw | None = None) -> Feedback:
    """B takes every step that w takes, and both lose the share `decay` of themselves.

    Their difference decays.

        w <- (1 - decay) w + step,    B <- (1 - decay) B + step,
        so    B - w <- (1 - decay) (B - w)

    The state is that difference, and B is `w + state`: right for any optimiser and any step. The
    decay of w itself is up to the optimiser, `optax.adamw(rate, weight_decay=decay / rate)` or
    `optax.add_decayed_weights(decay / rate)` before `optax.sgd(rate)`. Without it B still converges
    to w, but Kolen and Pollack's two sides would have to exchange their weights for that.

    Args:
        decay: the share per step, above 0 and best below 1.
        draw: what B starts from, as for `random_feedback`.

    >>> kolen_pollack().name
    'kolen_pollack'
    """
    _validate.positive("decay", decay)
    rest = 1 - float(decay)  # a NumPy number would widen the arrays

    def init(net, key, params):
        return tree.sub(_draw(draw, net, key, params), params)

    def step(net, state, params, x):
        return tree.add(params, state), tree.scale(rest, state)

    return Feedback("kolen_pollack", init, step)


@by_recipe
def weight_mirror(decay: float = 1e-2, noise: float = 1.0, draw: Draw | None = None) -> Feedback:
    """B learns w from noise.

    Every dense layer gets `a ~ N(0, noise^2)`, puts out `z = a w + b`, and its B takes a step; so
    does every convolution.

        B <- (1 - decay) B + decay / noise^2  mean over the batch of a^T z

    whose mean is w, since E[a^T a] = noise^2 I. Positions are examples. Of a convolution, a^T z is
    the gradient of its kernel where z is the error, and the mean is over the positions at which an
    offset of the kernel meets no padding. Akrout et al. mirror the activities f(z), for which
    that holds but for a number for every unit. Here it is z, before the activation, so that norms
    and flat activations that follow take no part. Every step costs one more forward pass and half a
    backward one, over as many rows of noise as there are examples. The first block needs no B, and
    a block that does not begin with `fnn.dense` or `fnn.conv` keeps its start.

    Args:
        decay: the share per step, above 0 and best below 1.
        noise: the standard deviation of the noise.
        draw: what B starts from, as for `random_feedback`.

    >>> weight_mirror().name
    'weight_mirror'
    """
    _validate.positive("decay", decay)
    _validate.positive("noise", noise)
    # NumPy numbers would widen the arrays
    rate = float(decay)
    std = float(noise)

    def init(net, key, params):
        first, key = jax.random.split(key)
        return _draw(draw, net, first, params), key

    def step(net, state, params, x):
        matrices, key = state
        key, noise_key = jax.random.split(key)
        chain = blocks(net)
        parts = chain.split(params)
        mirrors = list(chain.split(matrices))
        hs, _ = jax.eval_shape(chain.forward, parts, x)
        for i in range(1, len(parts)):
            block = chain.layers[i]
            if not begins_with_linear(block):
                continue
            b, *rest = mirrors[i]
            key_of_block = jax.random.fold_in(noise_key, i)
            a = std * jax.random.normal(key_of_block, hs[i].shape, b.w.dtype)
            estimate = _mirror(block.layers[0], parts[i][0], a) / std**2
            w = b.w + rate * (estimate - b.w)
            mirrors[i] = b._replace(w=w), *rest
        matrices = chain.join(mirrors)
        return matrices, (matrices, key)

    return Feedback("weight_mirror", init, step)


def _mirror(layer, params, a):
    """The mean of `a^T z` over examples and positions, for the responses z of a linear layer."""
    z, residuals = layer.forward(params, a)
    sums, _ = layer.backward(params, residuals, z)
    z, residuals = layer.forward(params, jnp.ones_like(a[:1]))
    counts, _ = layer.backward(params, residuals, jnp.ones_like(z))  # of positions, by number of w
    return sums.w / (a.shape[0] * jnp.maximum(counts.w, 1))


def _draw(draw, net, key, params):
    """Feedback matrices in the dtypes of the params, as the net draws where `draw` is None."""
    draw = draw or net.init
    return tree.cast_like(draw(key), params)


_KINDS = (
    random_feedback(),
    sign_symmetric(),
    sign_symmetric("fixed"),
    sign_symmetric("redrawn"),
    kolen_pollack(),
    weight_mirror(),
)
FEEDBACKS = {kind.name: kind for kind in _KINDS}
"""Every kind of feedback by its name, with its default settings: the tests run over it."""
