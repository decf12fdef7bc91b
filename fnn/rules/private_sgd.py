"""Differentially private SGD: the gradient of every example is clipped, and Gaussian noise added.

    grads = (sum_i g_i min(1, max_norm / |g_i|) + N(0, (noise_multiplier max_norm)^2 I)) / B

The guarantee: adding or removing one example moves the sum by at most `max_norm`, to rounding. So
the parameters after some steps, and all that is computed from them alone, are
(epsilon, delta)-differentially private under adding or removing one example, with the epsilon of
`PrivateRule.epsilon`, on these terms.

- Batches are Poisson samples: every step takes every example independently with the same
  probability (`fit(..., sampler=fnn.training.poisson_batches)`). `epsilon` gets that probability
  and the number of all steps. It does not hold for shuffled batches. The number of examples, and
  with it the probability, counts as public.
- B does not depend on the data: pass the *expected* batch size.
- The noise is that of an ideal generator. `jax.random` is no cryptographic one, nor is NumPy's,
  which draws the batches. Whoever knows the key knows the noise: keep it secret, use it once.
- Numbers are real. Noise in floating point is no exact Gaussian, and its lowest bits may tell
  examples apart (Mironov 2012); rounding may carry a share past `max_norm` by some units in the
  last place. Products run at JAX's highest precision for that reason.
- Net and loss treat examples one by one. Batch normalisation voids the guarantee;
  `fnn.per_example.check_source` finds it.

Not private: the losses (the value of the rule, the history of `fit`), validation, norms and
whatever else is looked at during training; the choice of hyperparameters by results; that training
stopped at a loss that is not finite. Weights say which rows are present: any weight above 0 counts
as 1.

Source: Abadi et al. (2016), arXiv:1607.00133, algorithm 1; clipping from one backward pass, Li et
al. (2022), arXiv:2110.05679. Accounting: Mironov (2017), arXiv:1702.07476 (RDP); Koskela, Jalko,
Honkela (2020), arXiv:1906.03049 (PLD). Floating point: Mironov (2012),
doi:10.1145/2382196.2382264.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Int
from optax import tree

from fnn import _validate, per_example
from fnn.backprop import weighted_mean
from fnn.per_example.clipping import layer_count
from fnn.rules._sources import source_of
from fnn.types import Array, Key, Layer, Loss, Rule, Source, by_recipe

Accountant = Literal["pld", "rdp"]
Schedule = Callable[[Any], Any]  # step, from 0 -> number
CUT_OFF = 1e-12  # greatest probability that a step of `poisson_batches` leaves examples out


class PrivateState(NamedTuple):
    """What `private_sgd` carries from step to step."""

    key: Key  # of the noise
    step: Int[Array, ""]


@dataclass(frozen=True, repr=False, eq=False)
class PrivateRule(Rule):
    """A `Rule` that knows what privacy it gives.

    Attributes:
        max_norm: the largest norm of the share of one example in the sum, or its schedule.
        noise_multiplier: the standard deviation of the noise in the sum, in units of `max_norm`, or
            its schedule.
    """

    max_norm: float | Schedule
    noise_multiplier: float | Schedule

    def epsilon(
        self, steps: int, sampling_rate: float, delta: float, accountant: Accountant = "pld"
    ) -> float:
        """The epsilon of (epsilon, delta)-differential privacy after some steps.

        One example is added or removed. `delta` is charged with the probability that
        `fnn.training.poisson_batches` cuts off a batch that is too large, times 1 + e^epsilon.

        Args:
            steps: all steps: epochs times `ceil(examples / batch_size)` for `poisson_batches`.
            sampling_rate: the probability that a step takes an example, above 0 and at most 1:
                `batch_size / examples`.
            delta: above 0 and below 1, and well below 1 / examples.
            accountant: `"pld"` (privacy loss distributions), which is tight; or `"rdp"` (Renyi
                divergences), a looser bound, which is fast also for noise multipliers below 0.2,
                where `"pld"` takes seconds and gigabytes.

        Returns:
            Infinite where a step has no noise, and where `delta` does not cover the charge.

        Raises:
            TypeError, ValueError: an argument is out of its range.
            ImportError: dp-accounting is not installed.

        >>> import fnn
        >>> rule = private_sgd(fnn.mlp((3, 2)), fnn.losses.l2_loss, noise_multiplier=1.1)
        >>> round(rule.epsilon(steps=60 * 234, sampling_rate=256 / 60_000, delta=1e-5), 2)
        2.38
        """
        _validate.positive("steps", steps, whole=True)
        _check_privacy(sampling_rate, delta, accountant)
        noises = Counter(float(_at(self.noise_multiplier, step)) for step in range(steps))
        return _epsilon(noises, sampling_rate, delta, accountant)


@by_recipe
def private_sgd(
    net: Layer | Source,
    loss: Loss | None = None,
    max_norm: float | Schedule = 1.0,
    noise_multiplier: float | Schedule = 1.0,
    *,
    per_layer: bool = False,
    batch_size: int | None = None,
    microbatch_size: int | None = None,
) -> PrivateRule:
    """The sum of clipped gradients with Gaussian noise, over the expected batch size.

    The top of this file says what is guaranteed.

    Args:
        net: any layer that treats examples one by one; or a source, such as
            `fnn.as_source(loss_fn)` of `loss_fn(params, x, targets)`, without a loss.
        loss: any loss that takes the outputs of the layer.
        max_norm: greatest norm of the gradient of an example, all parameters together; above 0 and
            finite. Or a schedule: a function of the step, counted from 0, such as optax's.
        noise_multiplier: at least 0 and finite; 0 clips without noise and is not private. Or a
            schedule.
        per_layer: clip the gradient of each of the L layers by its own norm, each to
            `max_norm / sqrt(L)`, so that the whole is at most `max_norm`. A layer is as for
            `fnn.per_example.clipped_gradient`.
        batch_size: the *expected* batch size that the sum is divided by, such as that of `fit`; if
            None, the rows of the batch, padding included (of `poisson_batches` about twice as many
            for small batches).
        microbatch_size: how many examples at a time, where a batch does not fit; None for all.

    Returns:
        A rule whose state is a `PrivateState`. An example whose loss or gradient is not finite
        contributes nothing to its value, the mean loss, which is *not* private; one whose gradient
        is not finite contributes nothing to the sum.

    Raises:
        TypeError, ValueError: an argument is invalid; while tracing, params narrower than float32,
            whose rounding would break the bound.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = private_sgd(net, fnn.losses.l2_loss, 0.5, 1.1, batch_size=5)
    >>> params = net.init(jax.random.key(0))
    >>> state = rule.init(jax.random.key(1), params)
    >>> value, grads, state = rule.value_and_grad(params, state, jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    factors_of, predict, loss = source_of("private_sgd", net, loss)
    sizes = {"batch_size": batch_size, "microbatch_size": microbatch_size}
    _check_settings(max_norm, noise_multiplier, **sizes)

    def clipped_sum(params, bound, x, targets, weights):
        if per_layer:
            shapes = jax.eval_shape(factors_of, params, x, targets)[1]
            bound = bound / math.sqrt(layer_count(shapes))
        clipped = per_example.clipped_gradient(
            factors_of, bound, per_layer=per_layer, reduction="sum"
        )
        if microbatch_size is not None:
            clipped = per_example.accumulate(clipped, microbatch_size)
        if weights is not None:
            _validate.per_example("weights", weights, targets.shape[0])
            weights = (jnp.asarray(weights) > 0).astype(jnp.float32)  # present, whatever it weighs
        with jax.default_matmul_precision("highest"):
            return clipped(params, x, targets, weights=weights)

    def value_and_grad(params, state, x, targets, weights=None):
        _check_width(params)
        key, noise_key = jax.random.split(state.key)
        bound = _at(max_norm, state.step)
        std = bound * _at(noise_multiplier, state.step)
        found = clipped_sum(params, bound, x, targets, weights)
        total = found.gradient
        noise = tree.random_like(noise_key, total, _draw)
        size = batch_size or len(found.values)

        def noisy(g, n):
            if not jnp.issubdtype(g.dtype, jnp.floating):
                return g  # whole numbers, which no step moves
            return (g + jnp.asarray(std, g.dtype) * n) / size

        grads = jax.tree.map(noisy, total, noise)
        counted = jnp.where(jnp.isfinite(found.values), found.reduction.weights, 0)
        return weighted_mean(found.values, counted), grads, PrivateState(key, state.step + 1)

    def init(key, params):
        return PrivateState(key, jnp.zeros((), jnp.int32))

    terms = max_norm, noise_multiplier
    return PrivateRule("private_sgd", init, value_and_grad, predict, loss, *terms)


def noise_for(
    epsilon: float,
    *,
    steps: int,
    sampling_rate: float,
    delta: float,
    accountant: Accountant = "pld",
) -> float:
    """The least noise multiplier with which a training has a given epsilon.

    Args:
        epsilon: above 0.
        steps: as for `PrivateRule.epsilon`, and so the others.
        sampling_rate: the probability that a step takes an example.
        delta: above 0 and below 1.
        accountant: `"pld"` or `"rdp"`.

    Returns:
        The noise multiplier, to 1e-3 too large at most.

    Raises:
        TypeError, ValueError: an argument is out of its range.
        ImportError: dp-accounting is not installed.

    >>> round(noise_for(2.38, steps=60 * 234, sampling_rate=256 / 60_000, delta=1e-5), 1)
    1.1
    """
    _validate.positive("epsilon", epsilon)
    _validate.positive("steps", steps, whole=True)
    _check_privacy(sampling_rate, delta, accountant)

    low, high = 0.0, math.inf
    while high - low > 1e-3:
        noise = min(2 * low + 1, (low + high) / 2)
        if noise > 1e6:
            raise ValueError(f"`epsilon` {epsilon!r} is not reached at this `delta`: raise either.")
        if _epsilon({noise: steps}, sampling_rate, delta, accountant) <= epsilon:
            high = noise
        else:
            low = noise
    return high


def _epsilon(noises, rate, delta, accountant):
    """Epsilon for so many steps of each noise multiplier, by dp-accounting."""
    if 0 in noises:
        return math.inf
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld, rdp
    except ImportError as error:
        raise ImportError(
            '`epsilon` needs the package dp-accounting. Install it: pip install "fnn[privacy]"'
        ) from error
    total = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[accountant]()
    for noise, steps in noises.items():
        total.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    # a whole batch is never too large
    cut_off = CUT_OFF * sum(noises.values()) if rate < 1 else 0.0
    found, before = 0.0, -1.0
    while found - before > 1e-6:
        # e^100 times any probability of a cut-off is more than 1
        left = delta - cut_off * (1 + math.exp(min(found, 100)))
        before, found = found, total.get_epsilon(left) if left > 0 else math.inf
    return float(found)


def _draw(key, shape, dtype):
    """Noise for one parameter; none for whole numbers."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.normal(key, shape, dtype)
    return jnp.zeros(shape, dtype)


def _at(number, step) -> Any:
    """The number, or a schedule's at a step."""
    return number(step) if callable(number) else float(number)


def _check_settings(max_norm, noise_multiplier, **sizes):
    if not callable(max_norm):
        _validate.positive("max_norm", max_norm)
    if not callable(noise_multiplier):
        _validate.not_negative("noise_multiplier", noise_multiplier)
    for name, size in sizes.items():
        if size is not None:
            _validate.positive(name, size, whole=True)


def _check_privacy(sampling_rate, delta, accountant):
    _validate.positive("sampling_rate", sampling_rate)
    _validate.positive("delta", delta)
    _validate.one_of("accountant", accountant, get_args(Accountant))
    if sampling_rate > 1:
        raise ValueError(
            f"`sampling_rate` must be at most 1, got {sampling_rate!r}. "
            "It is batch_size / examples."
        )
    if delta >= 1:
        raise ValueError(
            f"`delta` must be below 1, got {delta!r}. "
            "Pass a number well below 1 / examples, such as 1e-5."
        )


def _check_width(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype.itemsize < 4:
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` is {leaf.dtype}: private_sgd needs float32 "
                "at least, since the rounding of narrower numbers breaks the bound on a clipped "
                "gradient. Cast: `jax.tree.map(lambda p: p.astype(jnp.float32), params)`."
            )
