"""Feedback alignment: the error goes back through other matrices than the weights.

    dz_L = dE/dz_L,    dz_l = (dz_{l+1} B_{l+1}^T) (.) f'(z_l),    dw_l = h_{l-1}^T dz_l,    db_l =
    sum over the batch of dz_l

which is backprop with B_l in the place of w_l. A `Feedback` says what B is. It is a tree like the
parameters; a layer uses of it what carries its error back, a dense layer `w`, a norm its scale.

- `fixed`: drawn once, as the net draws its own start. Lillicrap et al. (2016),
doi:10.1038/ncomms13276.
- `sign_symmetric`: sign(w) (.) M, with M one number for each leaf (uSF), |drawn once| (frSF) or
|drawn at every step| (brSF).
  Liao, Leibo, Poggio (2016), arXiv:1510.05067; Moskovitz, Litwin-Kumar, Abbott (2018),
  arXiv:1812.06488.
- `kolen_pollack`: takes the step that w takes, and both decay. Kolen, Pollack (1994),
doi:10.1109/ICNN.1994.374486; Akrout et al. (2019),
  arXiv:1904.05391.
- `weight_mirror`: grows by noise^T z, where a layer answers z to noise. Akrout et al. (2019).

Lecture 003 shows a fixed random Jacobian in the place of w: this rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import check_net_and_loss, forward_pass, output_error, weighed, weighted_mean
from fnn.nets.blocks import begins_with_dense, blocks
from fnn.rules._blockwise import LocalRule
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params, State

Draw = Callable[[Key], Params]
MAGNITUDES = ("uniform", "fixed", "redrawn")


class Feedback(NamedTuple):
    """Where feedback matrices come from.

    Attributes:
        name: what tables call it.
        init: `(net, key, params) -> state`.
        step: `(net, state, params, x) -> (B, state)`: what the error goes back through now, and the
            state for the next step.
    """

    name: str
    init: Callable[[Layer, Key, Params], State]
    step: Callable[[Layer, State, Params, Array], tuple[Params, State]]


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
        TypeError, ValueError: an argument cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    check_net_and_loss(net, loss)
    warn_if_flat("feedback_alignment", net)
    if isinstance(feedback, str):
        _validate.one_of("feedback", feedback, FEEDBACKS)
    elif not isinstance(feedback, Feedback):
        raise TypeError(
            f"`feedback` must be one of {', '.join(FEEDBACKS)} or a `Feedback`, got {feedback!r:.80}."
        )
    chosen = FEEDBACKS[feedback] if isinstance(feedback, str) else feedback

    def value_and_grad(
        params: Params, state: State, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, State]:
        outputs, residuals, values = forward_pass(
            lambda x: net.forward(params, x), loss, x, targets
        )
        dy = weighed(output_error(loss, outputs, targets), weights)
        matrices, state = chosen.step(net, state, params, x)
        return weighted_mean(values, weights), net.backward(matrices, residuals, dy)[0], state

    def matrices(params: Params, state: State, x: Array) -> Params:
        return chosen.step(net, state, params, x)[0]

    def signals(params: Params, state: State, x: Array, targets: Array) -> list[Array]:
        chain = blocks(net)
        hs, residuals = chain.forward(chain.split(params), x)
        dys = [output_error(loss, hs[-1], targets)]
        back = zip(chain.layers, chain.split(matrices(params, state, x)), residuals, strict=True)
        for layer, b, kept in reversed(list(back)[1:]):
            dys.insert(0, layer.backward(b, kept, dys[0])[1])
        return dys

    name = "feedback_alignment" if chosen.name == "fixed" else f"feedback_alignment({chosen.name})"
    return LocalRule(
        name,
        lambda key, params: chosen.init(net, key, params),
        value_and_grad,
        net.apply,
        loss,
        signals,
        matrices,
    )


def random_feedback(draw: Draw | None = None) -> Feedback:
    """B is drawn once and never changes.

    Args:
        draw: `(key) -> tree like the params`, such as the `init` of the same net with another
            `kernel_init`; the net's own, if None.

    >>> random_feedback().name
    'fixed'
    """
    return Feedback(
        "fixed",
        lambda net, key, params: drawn(draw or net.init, key, params),
        lambda net, state, params, x: (state, state),
    )


def sign_symmetric(magnitude: str = "uniform", draw: Draw | None = None) -> Feedback:
    """B has the signs of w.

    Args:
        magnitude: `"uniform"`, the root mean square of each leaf as the net draws it; `"fixed"`,
            sizes drawn once; `"redrawn"`, sizes drawn at every step.
        draw: what sizes are drawn by, as for `random_feedback`.

    Raises:
        ValueError: the magnitude is none of these.

    >>> sign_symmetric("redrawn").name
    'sign_symmetric redrawn'
    """
    _validate.one_of("magnitude", magnitude, MAGNITUDES)

    def size(leaf: Array) -> Array:
        return (
            jnp.full_like(leaf, jnp.sqrt(jnp.mean(leaf**2)))
            if magnitude == "uniform"
            else jnp.abs(leaf)
        )

    def init(net: Layer, key: Key, params: Params) -> State:
        return (
            key
            if magnitude == "redrawn"
            else jax.tree.map(size, drawn(draw or net.init, key, params))
        )

    def step(net: Layer, state: State, params: Params, x: Array) -> tuple[Params, State]:
        sizes = state
        if magnitude == "redrawn":
            state, key = jax.random.split(state)
            sizes = jax.tree.map(size, drawn(draw or net.init, key, params))
        return jax.tree.map(lambda w, m: jnp.sign(w) * m, params, sizes), state

    return Feedback(
        "sign_symmetric" if magnitude == "uniform" else f"sign_symmetric {magnitude}", init, step
    )


def kolen_pollack(decay: float = 1.5e-3, draw: Draw | None = None) -> Feedback:
    """B takes every step that w takes, and both lose the share `decay` of themselves.

    What they differ by decays.

        w <- (1 - decay) w + step,    B <- (1 - decay) B + step,    so    B - w <- (1 - decay) (B -
        w)

    The state is that difference, and B is `w + state`: right for any optimiser, and for any step it
    makes. The decay of w itself is the optimiser's, `optax.adamw(rate, weight_decay=decay / rate)`
    or `optax.add_decayed_weights(decay / rate)` before `optax.sgd(rate)`; without it B still comes
    to w, but Kolen and Pollack's two sides would have to tell each other their weights for that.

    Args:
        decay: the share per step, above 0 and at most 1.
        draw: what B starts from, as for `random_feedback`.

    >>> kolen_pollack().name
    'kolen_pollack'
    """
    _share("decay", decay)
    decay = float(decay)  # a NumPy number would widen the arrays

    def init(net: Layer, key: Key, params: Params) -> State:
        return jax.tree.map(jnp.subtract, drawn(draw or net.init, key, params), params)

    def step(net: Layer, state: State, params: Params, x: Array) -> tuple[Params, State]:
        return jax.tree.map(jnp.add, params, state), jax.tree.map(lambda d: (1 - decay) * d, state)

    return Feedback("kolen_pollack", init, step)


def weight_mirror(decay: float = 1e-2, noise: float = 1.0, draw: Draw | None = None) -> Feedback:
    """B learns w from noise.

    Every dense layer is fed `a ~ N(0, noise^2)`, and where it answers `z = a w + b`, B takes.

        B <- (1 - decay) B + decay / noise^2  mean over the batch of a^T z

    whose mean is w, since E[a^T a] = noise^2 I. Akrout et al. mirror the activities f(z), for which
    that holds but for a number for every unit; the answer before the activation is mirrored here,
    so that norms and flat activations that follow take no part. One more pass forward and half a
    backward one in every step, over as many rows of noise as there are examples. Every block but
    the first must begin with `fnn.dense`.

    Args:
        decay: the share per step, above 0 and at most 1.
        noise: the standard deviation of what the blocks are fed.
        draw: what B starts from, as for `random_feedback`.

    >>> weight_mirror().name
    'weight_mirror'
    """
    _share("decay", decay)
    _validate.positive("noise", noise)
    decay, noise = float(decay), float(noise)  # a NumPy number would widen the arrays

    def init(net: Layer, key: Key, params: Params) -> State:
        for i, block in enumerate(blocks(net).layers[1:], 1):
            if not begins_with_dense(block):
                raise ValueError(
                    f"`net` of weight_mirror: block {i} must begin with a dense layer, whose answer to noise can be told apart, got "
                    f"{block.layers[0].name}. Take another feedback, such as 'kolen_pollack'."
                )
        first, key = jax.random.split(key)
        return drawn(draw or net.init, first, params), key

    def step(net: Layer, state: State, params: Params, x: Array) -> tuple[Params, State]:
        (matrices, key), chain = state, blocks(net)
        key, noise_key = jax.random.split(key)
        parts, found = chain.split(params), list(chain.split(matrices))
        inputs = jax.eval_shape(lambda: chain.forward(parts, x)[0][:-1])
        keys = jax.random.split(noise_key, len(inputs))
        for i in range(1, len(inputs)):  # the first block hands its error to nobody
            a = noise * jax.random.normal(keys[i], inputs[i].shape, inputs[i].dtype)
            first, w = chain.layers[i].layers[0], parts[i][0]
            z, residuals = first.forward(w, a)
            grads, _ = first.backward(w, residuals, z)
            rate = decay / noise**2 / (a.size // a.shape[-1])
            found[i] = (
                found[i][0]._replace(w=(1 - decay) * found[i][0].w + rate * grads.w),
                *found[i][1:],
            )
        matrices = chain.join(found)
        return matrices, (matrices, key)

    return Feedback("weight_mirror", init, step)


def drawn(draw: Draw, key: Key, params: Params) -> Params:
    """Feedback matrices in the dtypes of the params."""
    matrices = draw(key)
    if jax.tree.map(jnp.shape, matrices) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            "`draw` must return a tree like the params. Pass the `init` of a net of the same layers and sizes."
        )
    return jax.tree.map(lambda b, p: b.astype(p.dtype), matrices, params)


def _share(name: str, value: Any) -> None:
    _validate.positive(name, value)
    if value > 1:
        raise ValueError(f"`{name}` must be at most 1, the whole of it, got {value!r}.")


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
