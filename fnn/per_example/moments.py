"""Mean, variance and noise of the gradients in a batch, without a gradient per example.

Where E[g^2] - E[g]^2 cancels, as it does where the mean is large, the variance is centred before it
is squared: E[(g - E[g])^2].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn.factors import is_factor
from fnn.factors.rows import mended
from fnn.per_example.clipping import Reduction, count, total_weight, weighted_total
from fnn.per_example.norms import Source, asked, whole_norms
from fnn.types import Array, ArrayLike, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Mean and variance of the gradients. Unpacks as `mean, variance`.

    Attributes:
        mean: a tree like `params`, float32 at least.
        variance: the same, at least 0: the mean of the squared distances to the mean, by the
            weights (n / (n - 1) times it is the unbiased estimate).
        reduction: what they are of.
    """

    mean: Params
    variance: Params
    reduction: Reduction

    def __iter__(self) -> Iterator[Any]:
        return iter((self.mean, self.variance))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale and what it is made of.

    Attributes:
        noise_scale: `trace / squared_gradient`, in examples: the batch size above which larger
            batches help little. A ratio of two estimates: average those of several batches before
            dividing. Negative or huge where noise hides the gradient.
        trace: unbiased estimate of the trace of the gradients' covariance.
        squared_gradient: unbiased estimate of the squared norm of the true gradient; may be
            negative.
        reduction: what they are of.
    """

    noise_scale: Array
    trace: Array
    squared_gradient: Array
    reduction: Reduction


def moments(source: Source) -> Callable[..., Moments]:
    """Mean and centred variance of the gradients, entry by entry.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch, weights=None) -> Moments` (`mean, variance`). Examples of
        weight 0, and those whose gradient is not finite, count nowhere. No example that counts:
        both are 0.

    Source: for outer products, the expansion beside `Outer.moments`; Dangel, Kunstner, Hennig
    (2020), arXiv:1912.10985, take E[g^2] - E[g]^2, which is negative where it cancels.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = moments(fnn.source(net, fnn.losses.l2_loss))
    >>> mean, variance = f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> variance[-1].b
    Array([0., 0.], dtype=float32)
    """
    factors_of = asked(source)

    def mean_and_variance(
        params: Params, *batch: ArrayLike, weights: ArrayLike | None = None
    ) -> Moments:
        factors = factors_of(params, *batch)[1]
        norms = whole_norms(factors)
        counted = count("mean", norms, weights)
        share = counted.weights / total_weight(counted)

        leaves, tree = jax.tree.flatten(factors, is_leaf=is_factor)
        present = counted.weights != 0
        # what counts nothing must not overflow on the way
        harmless = jnp.isfinite(norms) & (present | (norms < 1e6))
        leaves = mended(harmless.all(), leaves, lambda leaves: [f.masked(present) for f in leaves])
        found = [f.wide().moments(share) for f in leaves]
        mean, variance = (jax.tree.unflatten(tree, [pair[i] for pair in found]) for i in (0, 1))
        return Moments(mean, variance, counted)

    return mean_and_variance


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SignalToNoise:
    """Squared mean over variance.

    Attributes:
        ratio: a tree like `params`, float32 at least; 0 where the mean is 0, infinite where the
            variance alone is.
        reduction: what it is of.
    """

    ratio: Params
    reduction: Reduction


def signal_to_noise(source: Source) -> Callable[..., SignalToNoise]:
    """Squared mean over variance of the gradients, entry by entry: where the examples agree.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch, weights=None) -> SignalToNoise`.

    Source: Liu, Bai, Jiang, Chen, Wang (2020), arXiv:2001.07384 (gradient signal to noise ratio).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = signal_to_noise(fnn.source(net, fnn.losses.l2_loss))
    >>> params, x = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0))), jnp.ones((2, 3))
    >>> f(params, x, jnp.array([[1.0, 0], [3, 0]])).ratio[-1].b
    Array([4., 0.], dtype=float32)
    """
    both = moments(source)

    def ratio(mean: Array, variance: Array) -> Array:
        some = variance > 0
        quotient = mean * mean / jnp.where(some, variance, jnp.ones_like(variance))
        return jnp.where(
            some, quotient, jnp.where(mean != 0, jnp.full_like(mean, jnp.inf), jnp.zeros_like(mean))
        )

    def signal(
        params: Params, *batch: ArrayLike, weights: ArrayLike | None = None
    ) -> SignalToNoise:
        found = both(params, *batch, weights=weights)
        return SignalToNoise(jax.tree.map(ratio, found.mean, found.variance), found.reduction)

    return signal


def noise_scale(source: Source) -> Callable[..., NoiseScale]:
    """The simple gradient noise scale tr(covariance) / |gradient|^2, from the norms of the
    gradients and of their mean.

    With shares p_i that add up to 1 and s = sum p_i^2 (1 / batch without weights), E[sum p_i
    |g_i|^2] = |G|^2 + tr and E[|sum p_i g_i|^2] = |G|^2 + s tr, which gives both without bias.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch, weights=None) -> NoiseScale`. Where fewer than two examples
        count, or no gradient is other than 0, the ratio is NaN.

    Raises:
        ValueError: a batch of one example.

    Source: McCandlish, Kaplan, Amodei et al. (2018), arXiv:1812.06162, appendix A.1 (small batch 1,
    big batch all).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = noise_scale(fnn.source(net, fnn.losses.l2_loss))
    >>> abs(float(f(net.init(jax.random.key(0)), jnp.ones((4, 3)), jnp.zeros((4, 2))).noise_scale)) < 1e-5  # all alike: no noise
    True
    """
    factors_of = asked(source)

    def estimate(params: Params, *batch: ArrayLike, weights: ArrayLike | None = None) -> NoiseScale:
        factors = factors_of(params, *batch)[1]
        norms = whole_norms(factors)
        if norms.shape[0] < 2:
            raise ValueError(
                "The noise scale needs at least 2 examples, got a batch of 1: one gradient does not scatter."
            )
        counted = count("mean", norms, weights)
        p = counted.weights / total_weight(counted)
        wide = jax.tree.map(lambda f: f.wide(), factors, is_leaf=is_factor)
        mean = weighted_total(
            wide, jax.tree.map(lambda _: p, factors, is_leaf=is_factor), jnp.isfinite(norms)
        )
        n = jnp.where(p != 0, norms, jnp.zeros_like(norms))
        # the ratio does not overflow where the squares do
        unit = jnp.where(n.max() > 0, n.max(), jnp.ones_like(n.max()))
        small = (p * (n / unit) ** 2).sum()
        leaves = jax.tree.leaves(mean)
        big = sum(((leaf.astype(unit.dtype) / unit) ** 2).sum() for leaf in leaves)
        s = (p * p).sum()
        several = jnp.where(counted.examples > 1, 1 - s, jnp.full_like(s, jnp.nan))
        trace, squared = (small - big) / several, (big - s * small) / several
        return NoiseScale(trace / squared, trace * unit**2, squared * unit**2, counted)

    return estimate
