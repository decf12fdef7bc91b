"""Mean, variance and noise of the gradients in a batch, without a gradient per example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fnn.factors import is_factor, keep, shares
from fnn.factors.base import all_of, fast_squared_norm, root, settle
from fnn.per_example.clipping import Reduction, count, weighted_gradient
from fnn.per_example.norms import ask, check_is_source, sum_squares
from fnn.types import Array, Params, Source, storable


@storable
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
        """`mean, variance`."""
        return iter((self.mean, self.variance))


@storable
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


@storable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale and what it is made of.

    Attributes:
        noise_scale: `trace / squared_gradient`, in examples: the batch size above which larger
            batches help little. A ratio of two estimates: average those of several batches before
            dividing. Negative or huge where noise hides the gradient.
        trace: unbiased estimate of the trace of the covariance of the gradients.
        squared_gradient: unbiased estimate of the squared norm of the true gradient; may be
            negative.
        reduction: what they are of.
    """

    noise_scale: Float[Array, ""]
    trace: Float[Array, ""]
    squared_gradient: Float[Array, ""]
    reduction: Reduction


def moments(source: Source) -> Callable[..., Moments]:
    """Mean and centred variance of the gradients, entry by entry.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch, weights=None) -> Moments`. Examples of weight 0, and those
        whose gradient is not finite, count for nothing. No example that counts: both are 0. The
        variance is E[g^2] - E[g]^2 where five digits are left of the difference; else it is that
        of the differences to one example.

    Source: Dangel, Kunstner, Hennig (2020), arXiv:1912.10985, take E[g^2] - E[g]^2, which is
    negative where it cancels.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = moments(fnn.source(net, fnn.losses.l2_loss))
    >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
    >>> mean, variance = f(net.init(jax.random.key(0)), *batch)
    >>> variance[-1].b
    Array([0., 0.], dtype=float32)
    """
    check_is_source(source)

    def mean_and_variance(params, *batch, weights=None):
        tree = ask(source, keep, params, *batch)[1]
        square, _ = sum_squares(fast_squared_norm.tree(tree))
        norms = root(square)
        counted = count("mean", norms, weights)
        share = shares(counted.weights)
        factors, structure = jax.tree.flatten(tree, is_leaf=is_factor)
        factors = [f.wide() for f in factors]

        raw = {}
        for i, f in enumerate(factors):
            found = f.raw_moments(share)
            if found is not None:
                raw[i] = found
        cheap = [factors[i] for i in raw]
        rest = iter(_variances(cheap, raw.values(), share))
        means = []
        spreads = []
        for i, f in enumerate(factors):
            if i in raw:
                mean = raw[i][0]
                spread = next(rest)
            else:
                mean, spread = _moments(f, share)
            means.append(mean)
            spreads.append(spread)
        return Moments(structure.unflatten(means), structure.unflatten(spreads), counted)

    return mean_and_variance


def _variances(factors, pairs, share):
    """E[g^2] - E[g]^2; of the differences to one example where fewer than five digits are left."""
    if not factors:
        return []

    def of_differences(operands):
        factors, share = operands
        return [_moments(f, share)[1] for f in factors]

    cheap = [square - mean * mean for mean, square in pairs]
    precise = [_is_precise(mean, square) for mean, square in pairs]
    return settle(all_of(precise), cheap, of_differences, (factors, share))


@jax.jit
def _moments(factor, share):
    """`Factor.moments`: one program for all factors of a shape."""
    return factor.moments(share)


@jax.jit
def _is_precise(mean, square):
    least = 1e5 * float(jnp.finfo(mean.dtype).eps)
    variance = square - mean * mean
    return (variance >= least * square).all()


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
    >>> params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0)))
    >>> f(params, jnp.ones((2, 3)), jnp.array([[1.0, 0], [3, 0]])).ratio[-1].b
    Array([4., 0.], dtype=float32)
    """
    both = moments(source)

    def signal(params, *batch, weights=None):
        found = both(params, *batch, weights=weights)
        ratios = jax.tree.map(_ratio, found.mean, found.variance)
        return SignalToNoise(ratios, found.reduction)

    return signal


@jax.jit
def _ratio(mean, variance):
    quotient = mean * mean / jnp.where(variance > 0, variance, 1)
    without_noise = jnp.where(mean != 0, jnp.inf, 0).astype(mean.dtype)
    return jnp.where(variance > 0, quotient, without_noise)


def noise_scale(source: Source) -> Callable[..., NoiseScale]:
    """The simple gradient noise scale tr(covariance) / |gradient|^2.

    It comes from the norms of the gradients and of their mean. With shares p_i that add up to 1 and
    s = sum p_i^2 (1 / batch without weights), E[sum p_i |g_i|^2] = |G|^2 + tr and
    E[|sum p_i g_i|^2] = |G|^2 + s tr, which gives both without bias.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch, weights=None) -> NoiseScale`. Where fewer than two examples
        count, or every gradient is 0, the ratio is NaN.

    Raises:
        ValueError: a batch of one example.

    Source: McCandlish, Kaplan, Amodei et al. (2018), arXiv:1812.06162, appendix A.1 (small batch 1,
    big batch all).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = noise_scale(fnn.source(net, fnn.losses.l2_loss))
    >>> alike = jnp.ones((4, 3)), jnp.zeros((4, 2))
    >>> abs(float(f(net.init(jax.random.key(0)), *alike).noise_scale)) < 1e-5  # no noise
    True
    """
    mean_of = weighted_gradient(source, reduction="mean")

    def estimate(params, *batch, weights=None):
        found = mean_of(params, *batch, weights=weights)
        counted = found.reduction
        if counted.weights.shape[0] == 1:
            raise ValueError(
                "The noise scale needs at least 2 examples, got a batch of 1: one gradient does "
                "not scatter."
            )
        p = shares(counted.weights)
        norms = jnp.where(p != 0, found.norms, 0)
        small = (p * norms**2).sum()
        big = 0
        for g in jax.tree.leaves(found.gradient):
            wide = g.astype(p.dtype)
            big += (wide**2).sum()
        s = (p * p).sum()
        several = (counted.examples > 1).astype(p.dtype)  # else 0 / 0
        divisor = several * (1 - s)
        trace = several * (small - big) / divisor
        squared = several * (big - s * small) / divisor
        return NoiseScale(trace / squared, trace, squared, counted)

    return estimate
