"""Differentially private SGD.

Every example's gradient clipped, and Gaussian noise for the largest share one example can have.

    grads = (sum_i g_i min(1, max_norm / |g_i|) + N(0, (noise_multiplier max_norm)^2 I)) / B

Guaranteed: adding or removing one example moves the sum by at most `max_norm`, to rounding. So the
parameters after some steps, and all that is computed from them alone, are (epsilon,
delta)-differentially private under adding or removing one example, with the epsilon of
`PrivateRule.epsilon`, on the following terms.

- Batches are Poisson samples: in every step every example is taken independently with the same
probability, and `epsilon` is told that
  probability and all the steps taken: `fit(..., sampler=fnn.data.poisson_batches)`. For shuffled
  batches that epsilon does not hold. How many examples there are, and with them the probability,
  counts as public.
- B does not depend on the data: pass the *expected* batch size. If None it is the static size of
the batch, padding included.
- The noise is that of an ideal generator. `jax.random` is no cryptographic one, nor is NumPy's,
which draws the batches; whoever knows
  the key knows the noise. Keep it secret, and use it once.
- Numbers are real. Noise in floating point is no exact Gaussian, and its lowest bits may tell
examples apart (Mironov 2012); rounding
  may carry a share past `max_norm` by some units in the last place. Products are taken at JAX's
  highest precision for that reason.
- Examples do not touch each other in net and loss. Batch normalisation voids all of it;
`fnn.per_example.check_source` finds it.

Not private: the losses (the rule's value and `fit`'s history), validation, norms and whatever else
is looked at on the way; the choice of hyperparameters by looking at results; that training stopped
at a loss that is not finite. Weights say which rows are there: above 0 counts as 1, since a larger
weight would be a larger share.

Source: Abadi et al. (2016), arXiv:1607.00133, algorithm 1; clipping from one backward pass, Li et
al. (2022), arXiv:2110.05679. Accounting: Mironov (2017), arXiv:1702.07476 (RDP); Koskela, Jalko,
Honkela (2020), arXiv:1906.03049 (PLD). Floating point: Mironov (2012), doi:10.1145/2382196.2382264.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import _validate, per_example
from fnn.backprop import source, weighted_mean
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params, Rule

ACCOUNTANTS = ("pld", "rdp")


@dataclass(frozen=True, repr=False)
class PrivateRule(Rule):
    """A `Rule` that knows what privacy it gives.

    Attributes:
        max_norm: the largest norm of one example's share in the sum.
        noise_multiplier: the noise's standard deviation in the sum, in units of `max_norm`.
    """

    max_norm: float
    noise_multiplier: float

    def epsilon(
        self, steps: int, sampling_rate: float, delta: float, accountant: str = "pld"
    ) -> float:
        """The epsilon of (epsilon, delta)-differential privacy after some steps, one example added
        or removed.

        Args:
            steps: all that were taken: epochs times `ceil(examples / batch_size)` for
                `poisson_batches`.
            sampling_rate: with what probability a step takes an example, above 0 and at most 1:
                `batch_size / examples`.
            delta: above 0 and below 1, and well below 1 / examples.
            accountant: `"pld"` (privacy loss distributions), which is tight; or `"rdp"` (Renyi
                divergences), a looser bound, at once also for noise multipliers below 0.2, where
                `"pld"` takes seconds and gigabytes.

        Returns:
            Infinite where there is no noise.

        Raises:
            TypeError, ValueError: an argument is out of its range.
            ImportError: dp-accounting is not installed.

        >>> import fnn
        >>> rule = private_sgd(fnn.mlp((3, 2)), fnn.losses.l2_loss, noise_multiplier=1.1)
        >>> round(rule.epsilon(steps=60 * 234, sampling_rate=256 / 60_000, delta=1e-5), 2)
        2.38
        """
        _validate.positive("steps", steps, whole=True)
        _validate.positive("sampling_rate", sampling_rate)
        _validate.positive("delta", delta)
        _validate.one_of("accountant", accountant, ACCOUNTANTS)
        if sampling_rate > 1:
            raise ValueError(
                f"`sampling_rate` must be at most 1, got {sampling_rate!r}. It is batch_size / examples."
            )
        if delta >= 1:
            raise ValueError(
                f"`delta` must be below 1, got {delta!r}. Well below 1 / examples means something: 1e-5."
            )
        if self.noise_multiplier == 0:
            return math.inf
        return _composed(
            self.noise_multiplier, int(steps), float(sampling_rate), float(delta), accountant
        )


def private_sgd(
    net: Layer,
    loss: Loss,
    max_norm: float = 1.0,
    noise_multiplier: float = 1.0,
    *,
    batch_size: int | None = None,
    microbatch_size: int | None = None,
) -> PrivateRule:
    """The sum of clipped gradients with Gaussian noise, over the expected batch size.

    What is guaranteed stands above.

    Args:
        net: any layer that treats examples one by one.
        loss: any loss that takes its outputs.
        max_norm: greatest norm of an example's gradient, all parameters together; above 0 and
            finite.
        noise_multiplier: at least 0 and finite; 0 clips without noise and is not private.
        batch_size: the *expected* batch size that the sum is divided by, such as `fit`'s; if None,
            the rows of the batch given, padding included (of `poisson_batches` about twice as many
            for small batches).
        microbatch_size: how many examples at a time, where a batch does not fit; all, if None.

    Returns:
        A rule whose state is a key, split at every step. Its value, the mean loss over the examples
        present whose loss is finite, is *not* private. An example whose gradient is not finite
        contributes nothing.

    Raises:
        TypeError, ValueError: an argument cannot be meant; while tracing, params narrower than
            float32, whose rounding would break the bound.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = private_sgd(net, fnn.losses.l2_loss, max_norm=0.5, noise_multiplier=1.1, batch_size=5)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    std = _standard_deviation(max_norm, noise_multiplier)
    if batch_size is not None:
        _validate.positive("batch_size", batch_size, whole=True)
    clipped = per_example.clipped_gradient(source(net, loss), max_norm, reduction="sum")
    warn_if_flat("private_sgd", net)
    if microbatch_size is not None:
        clipped = per_example.accumulate(clipped, microbatch_size)

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Key]:
        _check_wide(params)
        state, key = jax.random.split(state)
        present = _present(weights)
        with jax.default_matmul_precision("highest"):
            values, total, _ = clipped(params, x, targets, weights=present)
        counted = jnp.isfinite(values) if present is None else jnp.isfinite(values) & (present > 0)
        value = weighted_mean(
            jnp.where(counted, values, jnp.zeros_like(values)), counted.astype(jnp.float32)
        )
        size = values.shape[0] if batch_size is None else batch_size
        return (
            value,
            jax.tree.map(lambda g, n: (g + n) / size, total, _noise(key, total, std)),
            state,
        )

    name, settings = "private_sgd", (float(max_norm), float(noise_multiplier))
    return PrivateRule(name, lambda key, params: key, value_and_grad, net.apply, loss, *settings)


def _present(weights: Array | None) -> Array | None:
    """1 for every example that is there, whatever it weighs."""
    if weights is None:
        return None
    _validate.is_array("weights", weights)
    return (jnp.asarray(weights) > 0).astype(jnp.float32)


def _noise(key: Key, like: Params, std: float) -> Params:
    """A tree of Gaussian noise, every leaf by a key of its own."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            std * jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ],
    )


def _composed(
    noise_multiplier: float, steps: int, sampling_rate: float, delta: float, accountant: str
) -> float:
    """Epsilon by dp-accounting."""
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ImportError(
            '`epsilon` needs the package dp-accounting. Install it: pip install "fnn[privacy]"'
        ) from error
    made = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[accountant]()
    step = dp_accounting.PoissonSampledDpEvent(
        sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    made.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(made.get_epsilon(delta))


def _standard_deviation(max_norm: Any, noise_multiplier: Any) -> float:
    """The noise's standard deviation in the sum, its two parts checked."""
    _validate.positive("max_norm", max_norm)
    _validate.not_negative("noise_multiplier", noise_multiplier)
    std, limits = float(noise_multiplier) * float(max_norm), jnp.finfo(jnp.float32)
    for name, size in (("max_norm", float(max_norm)), ("noise_multiplier * max_norm", std)):
        if size and not float(limits.tiny) <= size <= float(limits.max):
            raise ValueError(
                f"`{name}` must be in float32's range, {limits.tiny:.1e} ... {limits.max:.1e}, got {size!r}."
            )
    return std


def _check_wide(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if np.dtype(_validate.canonical_dtype(leaf)).itemsize < 4:
            raise TypeError(
                f"`params{jax.tree_util.keystr(path)}` is {leaf.dtype}: private_sgd needs float32 at least, since the rounding of narrower "
                "numbers breaks the bound on a clipped gradient. Cast: `jax.tree.map(lambda p: p.astype(jnp.float32), params)`."
            )
