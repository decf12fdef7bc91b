"""Per-example statistics: what `jax.vmap(jax.grad)` and NumPy say, over random nets; their properties; their numerics."""

import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, case, cast, error, fast_jit, wide

import fnn
from fnn import losses, per_example
from fnn.factors import Outer, PerExample, Scatter, Stacked, is_factor
from fnn.per_example import clipped_gradient, gradients, gram, inner_products, moments, noise_scale, norms, signal_to_noise
from fnn.per_example import top_examples, weighted_gradient

NETS = range(105)
PROPERTY_NETS = (1, 4, 8, 10, 13, 17, 20, 22, 26, 28, 32, 35, 37, 41)  # each shape of SHAPES twice


# The truth, from gradients [batch, ...] written out


def flat(tree):
    """`[batch, parameters]` of leaves `[batch, ...]`."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide(tree)], 1)


def together(tree, weights):
    """The leaves of `sum_i weights_i g_i`."""
    return [np.tensordot(weights, leaf, 1) for leaf in wide(tree)]


def clip_to(bound):
    return lambda norms: np.where(norms > bound, bound / np.where(norms > bound, norms, 1), 1)


def gentle(norms):
    """A scale of one's own (automatic clipping, Bu et al. 2022), for NumPy and JAX."""
    return 1 / (norms + 0.01)


def scaled_by_layer(net, tree, scale):
    """Every example's gradient with every layer's part scaled by `scale(its norm)`; the copies in a `repeat` are layers."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree
    if net.name == "serial":
        return tuple(scaled_by_layer(layer, part, scale) for layer, part in zip(net.layers, tree, strict=True))
    if net.name.startswith("repeat("):
        parts = [jax.tree.map(lambda a, i=i: a[:, i], tree) for i in range(leaves[0].shape[1])]
        return jax.tree.map(lambda *copies: np.stack(copies, 1), *(scaled_by_layer(net.layers[0], part, scale) for part in parts))
    if net.layers:  # residual, iterate
        return scaled_by_layer(net.layers[0], tree, scale)
    factors = scale(np.linalg.norm(flat(tree), axis=1))
    return jax.tree.map(lambda a: np.asarray(a) * factors.reshape(-1, *(1,) * (a.ndim - 1)), tree)


def agree(ours, truth, size=None):
    """The two trees are the same to 1e-12 of the size of the true one, or of another where it is what rounding is relative to."""
    ours, truth = (np.concatenate([leaf.ravel() for leaf in wide(tree)]) for tree in (ours, truth))
    assert ours.shape == truth.shape
    apart = np.linalg.norm(ours - truth)
    assert apart <= 1e-12 * (np.linalg.norm(truth) if size is None else size), apart


def agree_with_noise_scale(found, g, share):
    """Against the two estimates as McCandlish et al. write them; both are differences of what `size` is the size of."""
    small, big, s = share @ (g**2).sum(1), ((share @ g) ** 2).sum(), (share**2).sum()
    if s == 1:  # one example
        assert np.isnan([found.trace, found.squared_gradient, found.noise_scale]).all()
        return
    trace, squared, size = (small - big) / (1 - s), (big - s * small) / (1 - s), small / (1 - s)
    agree((found.trace, found.squared_gradient), (trace, squared), size)
    if size:
        agree(found.noise_scale * squared, trace, size * (1 + abs(float(found.noise_scale))))


def agree_with_moments(found, ratio, tree, share):
    """The variance is a difference where the mean is large: right to 1e-12 of the second moment, and so is the ratio made of it."""
    mean = together(tree, share)
    variance = [np.tensordot(share, (leaf - m) ** 2, 1) for leaf, m in zip(wide(tree), mean, strict=True)]
    second = together(jax.tree.map(lambda g: np.asarray(g) ** 2, tree), share)
    size = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in second]))
    agree(found.mean, mean)
    agree(found.variance, variance, size)
    assert all((leaf >= 0).all() for leaf in wide(found.variance))
    for r, m, v in zip(wide(ratio), mean, variance, strict=True):
        some = np.isfinite(r)
        assert (np.abs(r[some] * v[some] - m[some] ** 2) <= 1e-12 * size * (1 + r[some])).all()
        assert (v[~some] <= 1e-12 * size).all()


# Every statistic on every net


def settings_of(number):
    """What is rotated over the nets: weights, and a second way of clipping: (per_layer, scale, reduction)."""
    second = [(True, None, "mean"), (False, gentle, "sum"), (True, gentle, "mean"), (True, None, "sum")][number % 4]
    return number % 3 != 0, second


@pytest.mark.parametrize("number", NETS)
def test_every_statistic_is_that_of_vmap_grad(x64, number):
    c = case(number)
    batch, rng = len(c.x), np.random.default_rng(number)
    source, mean = fnn.factors(c.net, c.loss), fnn.mean_loss(c.net, c.loss)
    weighted, (per_layer, own, kind) = settings_of(number)
    weights = rng.uniform(0.1, 2, batch) * (np.arange(batch) % 3 != 1) if weighted else np.ones(batch)
    signed, cut = rng.normal(size=batch), rng.permutation(batch)[: max(1, 2 * batch // 3)]
    first_kind = ("mean", "sum")[number % 2]

    @(fast_jit if number % 10 else jax.jit)  # every tenth net as JAX compiles by default
    def everything(params, x, t, weights, signed, bound):
        given = {"weights": weights} if weighted else {}
        arguments = (params, x, t)
        second = {"scale": own} if own else {"max_norm": bound}
        return {
            "truth": jax.vmap(lambda x, t: jax.value_and_grad(mean)(params, x[None], t[None]))(x, t),
            "gradients": gradients(source)(*arguments),
            "norms": norms(source)(*arguments),
            "top": top_examples(source, (batch + 1) // 2)(*arguments),
            "clipped": clipped_gradient(source, bound, reduction=first_kind)(*arguments, **given),
            "otherwise": clipped_gradient(source, per_layer=per_layer, reduction=kind, **second)(*arguments, **given),
            "weighted": weighted_gradient(source)(*arguments, weights=signed),
            "moments": moments(source)(*arguments, **given),
            "signal": signal_to_noise(source)(*arguments, **given),
            "noise": noise_scale(source)(*arguments, **given) if batch > 1 else None,
            "gram": gram(source)(*arguments),
            "inner": inner_products(source)(params, (x, t), (x[cut], t[cut])),
        }

    bound = 0.5 if number % 5 else np.inf
    found = everything(c.params, c.x, c.targets, jnp.asarray(weights), jnp.asarray(signed), jnp.asarray(bound))
    values, tree = found["truth"]
    g, share = flat(tree), weights / weights.sum()
    n = np.linalg.norm(g, axis=1)
    agree(found["gradients"], tree)
    np.testing.assert_allclose(found["norms"], n, rtol=1e-12, atol=0)
    largest = np.sort(n)[::-1][: (batch + 1) // 2]
    np.testing.assert_allclose(found["top"].norms, largest, rtol=1e-12)
    np.testing.assert_allclose(n[found["top"].examples], largest, rtol=1e-12)
    assert len(set(found["top"].examples.tolist())) == len(largest)

    clipped, otherwise, signed_sum = found["clipped"], found["otherwise"], found["weighted"]
    by = {"mean": share, "sum": weights}
    agree(clipped.gradient, together(tree, by[first_kind] * clip_to(bound)(n)))
    scale = gentle if own else clip_to(bound)
    one_by_one = scaled_by_layer(c.net, tree, scale) if per_layer else jax.tree.map(np.asarray, tree)
    agree(otherwise.gradient, together(one_by_one, by[kind] * (1 if per_layer else scale(n))))
    agree(signed_sum.gradient, together(tree, signed))
    for result, w in ((clipped, weights), (otherwise, weights), (signed_sum, signed)):
        assert jax.tree.structure(result.gradient) == jax.tree.structure(c.params)
        agree(result.values, values)
        np.testing.assert_allclose(result.norms, n, rtol=1e-12)
        np.testing.assert_array_equal(result.reduction.weights, w)
        assert not result.reduction.non_finite.any()

    agree_with_moments(found["moments"], found["signal"].ratio, tree, share)
    if batch > 1:
        agree_with_noise_scale(found["noise"], g, share)
    matrix = np.asarray(found["gram"])
    agree(matrix, g @ g.T)
    agree(found["inner"], g @ g[cut].T)
    np.testing.assert_allclose(matrix.diagonal(), np.asarray(found["norms"]) ** 2, rtol=1e-12)
    spectrum = np.linalg.eigvalsh(matrix)
    assert spectrum[0] >= -1e-12 * spectrum[-1]


def test_the_nets_cover_every_shape_activation_loss_and_setting():
    count = len(NETS)
    assert count >= 100
    assert {n // 3 % len(SHAPES) for n in NETS} == set(range(len(SHAPES)))
    assert {n % len(fnn.activations.ACTIVATIONS) for n in NETS} == set(range(len(fnn.activations.ACTIVATIONS)))
    assert {n // 2 % len(losses.LOSSES) for n in NETS} == set(range(len(losses.LOSSES)))
    assert sorted(n // 3 % len(SHAPES) for n in PROPERTY_NETS) == sorted(2 * list(range(len(SHAPES))))
