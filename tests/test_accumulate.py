"""Microbatches give what the whole batch gives.

`check_source` says whether a source has a gradient of each example.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, error, wide

import fnn
from fnn import losses, per_example
from fnn.factors import Outer, PerExample

CASES = (1, 8, 10, 13, 20, 22)
X, T = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
NET = fnn.mlp((3, 4, 3), "tanh")
PARAMS = jax.jit(NET.init)(jax.random.key(0))
SOURCE = fnn.source(NET, losses.l2_loss)
COUPLED = fnn.Loss(
    "centred",
    lambda y, t: ((y - y.mean(0)[None]) ** 2).sum(-1),
    lambda y, t: 2 * (y - y.mean(0)[None]),
)


def leaves(tree):
    return [leaf.astype(np.float64) for leaf in map(np.asarray, jax.tree.leaves(tree))]


@pytest.mark.parametrize(("number", "weighted"), [(1, False), (10, True), (20, False)])
def test_microbatches_of_every_size_give_the_whole_batch(x64, number, weighted):
    c = case(number, deepest=2)
    source, batch = fnn.source(c.net, c.loss), len(c.x)

    def sum_of_losses(params, x, t, weights=1.0):
        return (weights * source(params, x, t)[0]).sum()

    statistics = {
        "clipped": (per_example.clipped_gradient(source, 0.7), None),
        "sum": (per_example.clipped_gradient(source, 0.7, reduction="sum"), None),
        "weighted": (per_example.weighted_gradient(source), None),
        "moments": (per_example.moments(source), None),
        "value_and_grad": (fnn.value_and_grad(c.net, c.loss), "mean"),
    }
    if not weighted:
        statistics |= {
            "norms": (per_example.norms(source), "examples"),
            "gradients": (per_example.gradients(source), "examples"),
        }
        statistics["sum of losses"] = (sum_of_losses, "sum")
    given = (
        {
            "weights": jnp.asarray(
                np.random.default_rng(1).uniform(0, 2, batch) * (np.arange(batch) % 3 != 1)
            )
        }
        if weighted
        else {}
    )
    sizes = {max(1, batch // 3)} | (set() if weighted else {batch + 5})

    @jax.jit
    def everything(params, x, t, given):
        whole = {name: f(params, x, t, **given) for name, (f, _) in statistics.items()}
        parts = {
            size: {
                name: per_example.accumulate(f, size, reduction=r)(params, x, t, **given)
                for name, (f, r) in statistics.items()
            }
            for size in sizes
        }
        return whole, parts

    whole, parts = everything(c.params, c.x, c.targets, given)
    for size, found in parts.items():
        for name, result in found.items():
            assert jax.tree.structure(result) == jax.tree.structure(whole[name])
            assert error(leaves(result), leaves(whole[name])) <= 1e-12, (size, name)


def test_microbatches_state_their_reduction_and_leave_out_what_is_not_finite():
    f = per_example.clipped_gradient(SOURCE, 1.0)
    x = X.copy()
    x[4, 1] = np.nan
    weights = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    found = per_example.accumulate(f, 4)(PARAMS, x, T, weights=weights)
    assert str(found.reduction) == str(f(PARAMS, x, T, weights=weights).reduction)
    assert str(found.reduction) == (
        "mean over 4 of 6 examples, weights sum to 5; 1 left out because the gradient is not "
        "finite, the first in row 4"
    )
    rows = np.array([0, 2, 3, 5])
    without = f(PARAMS, X[rows], T[rows], weights=weights[rows])
    np.testing.assert_allclose(
        np.concatenate([g.ravel() for g in wide(found.gradient)]),
        np.concatenate([g.ravel() for g in wide(without.gradient)]),
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_weights_of_a_microbatch_may_sum_to_zero(size):
    whole = per_example.weighted_gradient(SOURCE, reduction="mean")
    weights = np.array([1, -1, 1, 1, 2, -2], np.float32)
    parts = jax.jit(per_example.accumulate(whole, size))(PARAMS, X, T, weights=weights)
    expected = whole(PARAMS, X, T, weights=weights)
    assert error(wide(parts.gradient), wide(expected.gradient)) <= 1e-5


def test_a_microbatch_is_all_that_is_in_memory():
    net = fnn.mlp((64, 256, 10))
    params, batch = (
        jax.jit(net.init)(jax.random.key(0)),
        (jnp.ones((1024, 64)), jnp.ones((1024, 10))),
    )
    f = per_example.clipped_gradient(fnn.source(net, losses.l2_loss), 1.0)
    whole, parts = (
        jax.jit(g).lower(params, *batch).compile().memory_analysis().temp_size_in_bytes
        for g in (f, per_example.accumulate(f, 32))
    )
    assert parts < whole / 4


def test_a_function_without_weights_needs_microbatches_that_divide_the_batch():
    f = per_example.accumulate(
        lambda params, x, t: SOURCE(params, x, t)[0].sum(), 4, reduction="sum"
    )
    with pytest.raises(ValueError, match="6 rows do not divide into microbatches of 4, and `fn`"):
        f(PARAMS, X, T)


def test_every_dtype_is_kept():
    for dtype in (jnp.bfloat16, jnp.float32):
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), PARAMS)
        batch = X.astype(dtype), T.astype(dtype)
        for f in (per_example.clipped_gradient(SOURCE, 1.0), per_example.moments(SOURCE)):
            whole, parts = (
                jax.tree.map(lambda a: a.dtype, jax.eval_shape(g, params, *batch))
                for g in (f, per_example.accumulate(f, 4))
            )
            assert whole == parts


@pytest.mark.parametrize("number", CASES)
def test_the_sources_of_nets_pass_the_check(x64, number):
    c = case(number)
    if len(c.x) > 1:
        per_example.check_source(fnn.source(c.net, c.loss), c.params, c.x, c.targets)


def batch_norm():
    """A layer that couples the examples: it takes the batch's mean off."""

    def backward(params, residuals, dy, reduce=None):
        return (), dy - jnp.broadcast_to(dy.mean(0)[None], dy.shape)

    return fnn.Layer(
        "centre",
        lambda key: (),
        lambda params, x: (x - jnp.broadcast_to(x.mean(0)[None], x.shape), ()),
        backward,
    )


def gradient_only(params, x, t):
    """A source whose values are apart but whose factors are not."""
    values, factors = SOURCE(params, x, t)
    last = factors[-1]
    coupled = last._replace(b=PerExample(last.b.gradient * last.b.gradient.sum()))
    return values, (*factors[:-1], coupled)


BAD_SOURCES = {
    "a loss over the batch": (
        fnn.source(NET, COUPLED),
        r"couples the examples: the loss of example 0 is .* in part of it",
    ),
    "batch normalisation": (
        fnn.source(fnn.serial(batch_norm(), NET), losses.l2_loss),
        r"couples the examples.*Use `layer_norm`",
    ),
    "a gradient alone": (
        gradient_only,
        r"couples the examples: the gradient norm at params\[1\]\.b of example \d",
    ),
    "values summed": (
        lambda p, x, t: (SOURCE(p, x, t)[0].sum(), SOURCE(p, x, t)[1]),
        r"one number per example, \(6,\), got \(\)",
    ),
    "factors of another shape": (
        lambda p, x, t: (
            SOURCE(p, x, t)[0],
            jax.tree.map(lambda w: PerExample(jnp.zeros((len(x), 2))), p),
        ),
        r"factor at `params.*` is of gradients \(6, 2\), expected \(6, 3, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_be_asked_is_found(name):
    source, message = BAD_SOURCES[name]
    params = ((), PARAMS) if name == "batch normalisation" else PARAMS
    with pytest.raises(ValueError, match=message):
        per_example.check_source(source, params, X, T)


def test_a_source_must_return_a_pair_of_values_and_factors():
    with pytest.raises(TypeError, match="must return \\(values, factors\\), got"):
        per_example.check_source(lambda p, x, t: SOURCE(p, x, t)[0], PARAMS, X, T)
    with pytest.raises(TypeError, match="a tree like `params` with a factor for every array"):
        per_example.check_source(lambda p, x, t: (SOURCE(p, x, t)[0], p), PARAMS, X, T)


def test_a_check_asks_for_two_examples():
    with pytest.raises(ValueError, match=r"at least 2, .* got \[1\] rows"):
        per_example.check_source(SOURCE, PARAMS, X[:1], T[:1])


def test_not_finite_alone_is_no_coupling():
    x = X.copy()
    x[1] = np.nan
    per_example.check_source(SOURCE, PARAMS, x, T)


def test_an_outer_factor_stands_for_a_product_of_any_source():
    def source(params, x, t):
        e = x @ params - t
        return (e**2).sum(1) / 2, Outer(x, e)

    per_example.check_source(source, jnp.ones((3, 3)), X, T)
