"""Per-example statistics: what `jax.vmap(jax.grad)` and NumPy say, over random nets.

Their properties; their numerics.
"""

import functools
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, case, cast, default_jit, error, wide

import fnn
from fnn import losses, per_example
from fnn.factors import Outer, PerExample, Scatter, Stacked, is_factor
from fnn.per_example import (
    clipped_gradient,
    gradients,
    gram,
    inner_products,
    moments,
    noise_scale,
    norms,
    ntk,
    signal_to_noise,
    top_examples,
    weighted_gradient,
)

NETS = range(101)
PROPERTY_NETS = (1, 4, 8, 10, 13, 17, 20)  # each shape of SHAPES


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
    """Every example's gradient with every layer's part scaled by `scale(its norm)`.

    The copies in a `repeat` are layers.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree
    if net.name == "serial":
        return tuple(
            scaled_by_layer(layer, part, scale)
            for layer, part in zip(net.layers, tree, strict=True)
        )
    if net.name.startswith("repeat("):
        parts = [jax.tree.map(lambda a, i=i: a[:, i], tree) for i in range(leaves[0].shape[1])]
        return jax.tree.map(
            lambda *copies: np.stack(copies, 1),
            *(scaled_by_layer(net.layers[0], part, scale) for part in parts),
        )
    if net.layers:  # residual, iterate
        return scaled_by_layer(net.layers[0], tree, scale)
    factors = scale(np.linalg.norm(flat(tree), axis=1))
    return jax.tree.map(lambda a: np.asarray(a) * factors.reshape(-1, *(1,) * (a.ndim - 1)), tree)


def agree(ours, truth, size=None):
    """The two trees are the same to 1e-12 of the size of the true one, or of another where it is
    what rounding is relative to."""
    ours, truth = (np.concatenate([leaf.ravel() for leaf in wide(tree)]) for tree in (ours, truth))
    assert ours.shape == truth.shape
    apart = np.linalg.norm(ours - truth)
    assert apart <= 1e-12 * (np.linalg.norm(truth) if size is None else size), apart


def agree_with_noise_scale(found, g, share):
    """Against the two estimates as McCandlish et al. write them.

    Both are differences of what `size` is the size of.
    """
    small, big, s = share @ (g**2).sum(1), ((share @ g) ** 2).sum(), (share**2).sum()
    if np.count_nonzero(share) < 2:
        assert np.isnan([found.trace, found.squared_gradient, found.noise_scale]).all()
        return
    trace, squared, size = (small - big) / (1 - s), (big - s * small) / (1 - s), small / (1 - s)
    agree((found.trace, found.squared_gradient), (trace, squared), size)
    if size:
        agree(found.noise_scale * squared, trace, size * (1 + abs(float(found.noise_scale))))


def agree_with_moments(found, ratio, tree, share):
    """The variance is a difference where the mean is large.

    Right to 1e-12 of the second moment, and so is the ratio made of it.
    """
    mean = together(tree, share)
    variance = [
        np.tensordot(share, (leaf - m) ** 2, 1) for leaf, m in zip(wide(tree), mean, strict=True)
    ]
    second = together(jax.tree.map(lambda g: np.asarray(g) ** 2, tree), share)
    size = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in second]))
    agree(found.mean, mean)
    agree(found.variance, variance, size)
    assert all((leaf >= 0).all() for leaf in wide(found.variance))
    for r, m, v in zip(wide(ratio), mean, variance, strict=True) if ratio else ():
        some = np.isfinite(r)
        assert (np.abs(r[some] * v[some] - m[some] ** 2) <= 1e-12 * size * (1 + r[some])).all()
        assert (v[~some] <= 1e-12 * size).all()


# Every statistic on every net


def traced_once(source, *arguments):
    """The source at these arguments, for several statistics of one program that ask for its factors
    alone."""
    answer = source(*arguments)
    return lambda *_: answer


def settings_of(number):
    """What takes turns over the nets: weights, and a second way of clipping.

    (per_layer, scale, reduction).
    """
    second = [
        (True, None, "mean"),
        (False, gentle, "sum"),
        (True, gentle, "mean"),
        (True, None, "sum"),
    ][number // 2 % 4]
    return number % 3 != 0, second


# Beside the truth and the norms, a net is asked for one half, the next net for the other: so each
# statistic meets fifty nets, and every shape at least six of them.
HALVES = (
    {"truth", "top", "gradients", "clipped", "weighted", "moments", "signal"},
    {"truth", "top", "otherwise", "noise", "gram", "inner"},
)


@pytest.mark.parametrize("number", NETS)
def test_every_statistic_is_that_of_vmap_grad(x64, number):
    by_default = number % 15 == 0  # as JAX compiles by default: seven nets, each of another shape
    c = case(number, deepest=1 if by_default else 2)
    batch, rng = len(c.x), np.random.default_rng(number)
    source, mean = fnn.source(c.net, c.loss), fnn.mean_loss(c.net, c.loss)
    weighted, (per_layer, own, kind) = settings_of(number)
    weights = (
        rng.uniform(0.1, 2, batch) * (np.arange(batch) % 3 != 1) if weighted else np.ones(batch)
    )
    signed, cut = rng.normal(size=batch), rng.permutation(batch)[: max(1, 2 * batch // 3)]
    first_kind = ("mean", "sum")[number // 2 % 2]
    asked = HALVES[number % 2] - ({"noise"} if batch == 1 else set())
    asked -= set() if number % 9 == 1 else {"signal"}

    @(default_jit if by_default else jax.jit)
    def everything(params, x, t, weights, signed, bound):
        given = {"weights": weights} if weighted else {}
        arguments, second = (params, x, t), {"scale": own} if own else {"max_norm": bound}
        known = traced_once(source, *arguments)
        ways = {
            "truth": lambda: jax.vmap(
                lambda x, t: jax.value_and_grad(mean)(params, x[None], t[None])
            )(x, t),
            "gradients": lambda: gradients(source)(*arguments),
            "top": lambda: top_examples(source, batch)(*arguments),  # all of `norms`, in order
            "clipped": lambda: clipped_gradient(known, bound, reduction=first_kind)(
                *arguments, **given
            ),
            "otherwise": lambda: clipped_gradient(
                known, per_layer=per_layer, reduction=kind, **second
            )(*arguments, **given),
            "weighted": lambda: weighted_gradient(known)(*arguments, weights=signed),
            "moments": lambda: moments(known)(*arguments, **given),
            "signal": lambda: signal_to_noise(known)(*arguments, **given).ratio,
            "noise": lambda: noise_scale(known)(*arguments, **given),
            "gram": lambda: gram(known)(*arguments),
            "inner": lambda: inner_products(source)(params, (x, t), (x[cut], t[cut])),
        }
        return {name: way() for name, way in ways.items() if name in asked}

    bound = 0.5 if number % 5 else np.inf
    found = everything(
        c.params, c.x, c.targets, jnp.asarray(weights), jnp.asarray(signed), jnp.asarray(bound)
    )
    values, tree = found["truth"]
    g, share = flat(tree), weights / weights.sum()
    n = np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(found["top"].norms, n[found["top"].examples], rtol=1e-12, atol=0)
    np.testing.assert_allclose(found["top"].norms, np.sort(n)[::-1], rtol=1e-12, atol=0)
    assert set(found["top"].examples.tolist()) == set(range(batch))

    scale, by = gentle if own else clip_to(bound), {"mean": share, "sum": weights}
    one_by_one = (
        scaled_by_layer(c.net, tree, scale) if per_layer else jax.tree.map(np.asarray, tree)
    )
    sums = {
        "clipped": (together(tree, by[first_kind] * clip_to(bound)(n)), weights),
        "otherwise": (together(one_by_one, by[kind] * (1 if per_layer else scale(n))), weights),
        "weighted": (together(tree, signed), signed),
    }
    for name in asked & sums.keys():
        result, (gradient, w) = found[name], sums[name]
        agree(result.gradient, gradient)
        assert jax.tree.structure(result.gradient) == jax.tree.structure(c.params)
        agree(result.values, values)
        np.testing.assert_allclose(result.norms, n, rtol=1e-12)
        np.testing.assert_array_equal(result.reduction.weights, w)
        assert not result.reduction.non_finite.any()

    if "moments" in asked:
        agree(found["gradients"], tree)
        agree_with_moments(found["moments"], found.get("signal"), tree, share)
    if "noise" in asked:
        agree_with_noise_scale(found["noise"], g, share)
    if "gram" in asked:
        agree(found["inner"], g @ g[cut].T)
        agree_with_gram(found["gram"], g, found["top"])


def agree_with_gram(found, g, top):
    matrix = np.asarray(found)
    agree(matrix, g @ g.T)
    np.testing.assert_allclose(np.sqrt(matrix.diagonal()[top.examples]), top.norms, rtol=1e-12)
    spectrum = np.linalg.eigvalsh(matrix)
    assert spectrum[0] >= -1e-12 * spectrum[-1]


def test_the_nets_cover_every_shape_activation_and_loss():
    assert len(NETS) >= 100
    for half in (0, 1):
        numbers = [n for n in NETS if n % 2 == half]
        assert {n // 3 % len(SHAPES) for n in numbers} == set(range(len(SHAPES)))
    assert {n % len(fnn.activations.ACTIVATIONS) for n in NETS} == set(
        range(len(fnn.activations.ACTIVATIONS))
    )
    assert {n // 2 % len(losses.LOSSES) for n in NETS} == set(range(len(losses.LOSSES)))
    assert sorted(n // 3 % len(SHAPES) for n in PROPERTY_NETS) == list(range(len(SHAPES)))


# Properties


@pytest.mark.parametrize("number", PROPERTY_NETS)
def test_properties(x64, number):
    """Of sums, clipping, order and copies: one program for a net, asked with other numbers."""
    c = case(number, deepest=3)
    batch, rng = len(c.x), np.random.default_rng(number)
    source = fnn.source(c.net, c.loss)
    ones, batch_gradient = np.ones(batch), fnn.value_and_grad(c.net, c.loss)

    @jax.jit
    def ask(params, x, t, weights, bound):
        known, vmapped = (
            traced_once(source, params, x, t),
            per_example.by_vmap(batch_gradient)(params, x, t),
        )
        return {
            "norms": norms(source)(params, x, t),
            "clipped": clipped_gradient(known, bound, reduction="sum")(
                params, x, t, weights=weights
            ),
            "sum": weighted_gradient(known)(params, x, t, weights=weights),
            "moments": moments(known)(params, x, t, weights=weights),
            "gram": gram(known)(params, x, t),
            "gradient": batch_gradient(params, x, t)[1],
            "vmapped": vmapped,
            "norms of vmapped": per_example.norms_of(vmapped[1]),
        }

    found = ask(c.params, c.x, c.targets, ones, jnp.inf)
    each = wide(found["vmapped"][1])
    size = np.sqrt((np.asarray(found["norms"]) ** 2).sum() * batch)

    # the per-example gradients add up to the gradient; without a bound, clipping is nothing
    agree(found["sum"].gradient, [g.sum(0) for g in each])
    agree(found["sum"].gradient, [batch * g for g in wide(found["gradient"])])
    agree(found["clipped"].gradient, found["sum"].gradient)
    agree(found["moments"].mean, found["gradient"])
    agree(found["clipped"].values, found["vmapped"][0])
    agree(found["norms"], found["norms of vmapped"])

    # in another order, the same in that order
    order, weights, bound = rng.permutation(batch), rng.uniform(0, 2, batch), 0.3
    there = ask(c.params, c.x, c.targets, weights, bound)
    x, targets = np.asarray(c.x), np.asarray(c.targets)
    moved = ask(c.params, x[order], targets[order], weights[order], bound)
    agree(moved["norms"], there["norms"][order])
    agree(moved["gram"], there["gram"][order][:, order])
    for name in ("clipped", "sum"):
        agree(moved[name].gradient, there[name].gradient)
        agree(moved[name].norms, there[name].norms[order])
    agree(moved["moments"].mean, there["moments"].mean)
    second = np.linalg.norm(np.concatenate([(g**2).mean(0).ravel() for g in each]))
    agree(moved["moments"].variance, there["moments"].variance, second)

    # copies of one example do not vary
    copies = ask(c.params, *(np.repeat(a[:1], batch, 0) for a in (x, targets)), weights, bound)
    own = np.linalg.norm(np.concatenate([g[0].ravel() for g in each]) ** 2)
    agree(copies["moments"].variance, jax.tree.map(np.zeros_like, c.params), own)
    agree(copies["moments"].mean, [g[0] for g in each])
    agree(copies["gram"], np.full((batch, batch), float(found["norms"][0]) ** 2))

    # a batch in two parts
    first = (np.arange(batch) % 2 == 0).astype(float)
    parts = [
        ask(c.params, c.x, c.targets, w, bound)["clipped"].gradient for w in (first, 1 - first)
    ]
    whole = ask(c.params, c.x, c.targets, ones, bound)["clipped"].gradient
    agree(jax.tree.map(np.add, *parts), whole)

    # batches that differ by one example differ by no more than the bound
    for i in range(min(batch, 6)):
        without = ask(c.params, c.x, c.targets, np.where(np.arange(batch) == i, 0.0, 1.0), bound)[
            "clipped"
        ]
        apart = np.linalg.norm(
            np.concatenate(
                [(a - b).ravel() for a, b in zip(wide(whole), wide(without.gradient), strict=True)]
            )
        )
        assert apart <= bound * (1 + 1e-12) + 1e-14 * size
        assert apart >= min(bound, float(found["norms"][i])) * (1 - 1e-9) - 1e-14 * size


NET = fnn.serial(
    fnn.dense(5, 6),
    fnn.activations.tanh,
    fnn.repeat(
        fnn.residual(fnn.serial(fnn.layer_norm(6), fnn.dense(6, 6), fnn.activations.gelu)), 2
    ),
    fnn.iterate(fnn.residual(fnn.serial(fnn.dense(6, 6), fnn.activations.softplus)), 3),
    fnn.rms_norm(6),
    fnn.dense(6, 4),
)
SOURCE = fnn.source(NET, losses.l2_loss)


def net_case(*shape, seed=0, scale=0.7):
    """Params of `NET` and a batch `[*shape, 5]`, `[*shape, 4]`, in float64 where that is on."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: jnp.asarray(scale * rng.normal(size=p.shape)),
        jax.eval_shape(NET.init, jax.random.key(0)),
    )
    return (
        params,
        jnp.asarray(rng.normal(size=(*shape, 5))),
        jnp.asarray(rng.normal(size=(*shape, 4))),
    )


def robust(source, bound=0.7):
    """What leaves out what is not finite: `(params, x, t, weights) -> dict`."""

    def ask(params, x, t, weights):
        known, given = traced_once(source, params, x, t), {"weights": weights}
        return {
            "clipped": clipped_gradient(known, bound)(params, x, t, **given),
            "per layer": clipped_gradient(known, bound, per_layer=True, reduction="sum")(
                params, x, t, **given
            ),
            "weighted": weighted_gradient(known)(params, x, t, **given),
            "moments": moments(known)(params, x, t, **given),
            "noise": noise_scale(known)(params, x, t, **given),
        }

    return ask


def numbers_of(found):
    """What `robust` says of the batch as a whole, and not row by row."""
    return {
        name: jax.tree.leaves(result)[: -len(jax.tree.leaves(result.reduction))]
        for name, result in found.items()
    } | {
        name: result.gradient
        for name, result in found.items()
        if isinstance(result, per_example.Gradient)
    }


@pytest.fixture(scope="module")
def ask_any():
    with jax.enable_x64(True):
        unit = clipped_gradient(SOURCE, scale=lambda n: 1 / n)

        def ask(*batch, weights):
            more = {
                "unit": unit(*batch, weights=weights),
                "signal": signal_to_noise(SOURCE)(*batch, weights=weights),
            }
            return robust(SOURCE)(*batch, weights) | more

        return jax.jit(ask)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(
    weights=st.lists(
        st.sampled_from([0.0, 0.25, 1.0, 3.0]) | st.floats(0.125, 4.0, width=16),
        min_size=9,
        max_size=9,
    ),
    broken=st.dictionaries(
        st.integers(0, 8), st.sampled_from(["x nan", "x inf", "t nan", "t -inf"]), max_size=5
    ),
)
def test_any_examples_that_are_not_finite_count_nothing(ask_any, weights, broken):
    """Whatever the weights.

    What stands in a broken row, or in one of weight 0, is as if it were not there.
    """
    with jax.enable_x64(True):
        params, x, t = jax.tree.map(np.array, net_case(9))
        good, weights = np.array([i not in broken for i in range(9)]), np.asarray(weights)
        hypothesis.assume(((weights != 0) & good).sum() >= 2)
        # the same rows, whole, but of weight 0
        tidy = ask_any(params, x, t, weights=weights * good)
        x, t = x.copy(), t.copy()  # the call before may still read the others
        for row, how in broken.items():
            which, value = how.split()
            (x if which == "x" else t)[row, 1] = float(value)
        messy = ask_any(params, x, t, weights=weights)
        for name, value in numbers_of(tidy).items():
            agree(numbers_of(messy)[name], value)
            np.testing.assert_array_equal(messy[name].reduction.weights, weights * good)
            np.testing.assert_array_equal(messy[name].reduction.non_finite, ~good & (weights != 0))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 17])
def test_a_repeat_of_few_units_over_many_examples_is_clipped(x64, width):
    """XLA's compiler may abort over a product of 2 x 2 or 3 x 3 in a loop.

    See `_product` of fnn/factors/outer.py.
    """
    net, rng = fnn.repeat(fnn.dense(width, width), 2), np.random.default_rng(width)
    params, source = jax.jit(net.init)(jax.random.key(0)), fnn.source(net, losses.l2_loss)
    x, t = jnp.asarray(rng.normal(size=(2, 144, width)))
    found = jax.jit(clipped_gradient(source, float("inf")))(params, x.at[3, 0].set(jnp.nan), t)
    without = jax.jit(fnn.value_and_grad(net, losses.l2_loss))(
        params, x, t, weights=jnp.ones(144).at[3].set(0)
    )[1]
    agree(found.gradient, without)


EMBEDDING = fnn.serial(fnn.embedding(7, 5), fnn.dense(5, 4), fnn.activations.tanh, fnn.dense(4, 3))
BROKEN = {  # net, positions, what is put into row 4, and where
    "nan in x": (NET, (), "x", np.nan),
    "inf in x": (NET, (), "x", np.inf),
    "nan in the targets": (NET, (), "t", np.nan),
    "inf in the targets": (NET, (), "t", -np.inf),
    "nan at a position": (NET, (3,), "x", np.nan),
    "nan at many positions": (NET, (30,), "x", np.nan),
    "overflow on the way": (fnn.mlp((5, 6, 6, 4), "relu"), (), "x", 1e25),
    "overflow of a product": (fnn.mlp((5, 6, 4), "identity"), (2,), "x", 1e20),
    "no such row of an embedding": (EMBEDDING, (3,), "x", 7),
}


@functools.cache
def ask_robustly(net):
    return jax.jit(robust(fnn.source(net, losses.l2_loss)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in BROKEN]
    + [(name, "float32") for name in BROKEN if "over" in name],
)
def test_a_broken_example_leaves_the_batch_as_if_it_were_not_in_it(x64, name, dtype):
    net, positions, where, value = BROKEN[name]
    params, x, t = net_case(7, *positions)
    params = jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(1).normal(size=p.shape)),
        jax.eval_shape(net.init, jax.random.key(0)),
    )
    if net is EMBEDDING:
        x, t = jnp.asarray(np.random.default_rng(2).integers(0, 7, (7, *positions))), t[..., :3]
    params, x, t = cast((params, x, t), dtype)
    if dtype == "float64" and "overflow" in name:
        value = value**9
    at = (4, *(1,) * (x.ndim - 1))
    broken = (x.at[at].set(value), t) if where == "x" else (x, t.at[at].set(value))
    rest, weights = np.array([0, 1, 2, 3, 5, 6]), np.array([1.0, 2.0, 0.0, 0.5, 1.5, 1.0, 3.0])
    ask = ask_robustly(net)
    found, without = ask(params, *broken, weights), ask(params, x[rest], t[rest], weights[rest])
    padded = ask(params, *broken, np.where(np.arange(7) == 4, 0, weights))
    for key, truth in numbers_of(without).items():
        for messy in (found, padded):
            assert all(np.isfinite(leaf).all() for leaf in wide(numbers_of(messy)[key]))
            assert (
                error(wide(numbers_of(messy)[key]), wide(truth))
                <= {"float64": 1e-12, "float32": 2e-6}[dtype]
            ), key
        assert found[key].reduction.non_finite.tolist() == [i == 4 for i in range(7)]
        assert not padded[key].reduction.non_finite.any()
        np.testing.assert_array_equal(
            found[key].reduction.weights[rest], without[key].reduction.weights
        )
    assert not np.isfinite(found["clipped"].norms[4])
    np.testing.assert_allclose(found["clipped"].norms[rest], without["clipped"].norms, rtol=1e-6)


def test_clipping_layer_by_layer_goes_by_the_layers_that_repeat_stacks(x64):
    """The layers of a `repeat` are clipped like those of the same net written out as a `serial`.

    No layer exceeds the bound.
    """
    block, n, bound = (
        fnn.residual(fnn.serial(fnn.layer_norm(6), fnn.dense(6, 6), fnn.activations.gelu)),
        3,
        0.2,
    )
    ends = fnn.dense(5, 6), fnn.dense(6, 4)
    stacked, flat_net = (
        fnn.serial(ends[0], fnn.repeat(block, n), ends[1]),
        fnn.serial(ends[0], *[block] * n, ends[1]),
    )
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape)),
        jax.eval_shape(stacked.init, jax.random.key(0)),
    )
    written_out = (
        params[0],
        *(jax.tree.map(lambda a, i=i: a[i], params[1]) for i in range(n)),
        params[2],
    )
    batch = jnp.asarray(rng.normal(size=(1, 5))), jnp.asarray(rng.normal(size=(1, 4)))

    @jax.jit
    def both(params, written_out, x, t):
        return [
            clipped_gradient(fnn.source(net, losses.l2_loss), bound, per_layer=True)(
                p, x, t
            ).gradient
            for net, p in ((stacked, params), (flat_net, written_out))
        ]

    together, apart = both(params, written_out, *batch)
    agree((together[0], together[2]), (apart[0], apart[-1]))
    agree(together[1], jax.tree.map(lambda *copies: np.stack(copies), *apart[1:-1]))
    sizes = [
        np.linalg.norm(np.concatenate([a.ravel() for a in wide(part)]))
        for copy in apart
        for part in ([copy] if isinstance(copy, fnn.nets.layers.Dense) else copy[:2])
    ]
    assert len(sizes) == 2 + 2 * n
    # of one example: every layer is at its bound
    np.testing.assert_allclose(sizes, bound, rtol=1e-12)


@pytest.mark.parametrize("positions", [1, 2, 3, 4, 5, 9, 20])
def test_positions_on_both_sides_of_the_border_between_methods(x64, positions):
    net, loss = (
        fnn.serial(fnn.dense(8, 6), fnn.activations.tanh, fnn.dense(6, 5)),
        losses.squared_error,
    )
    rng = np.random.default_rng(positions)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape)), jax.eval_shape(net.init, jax.random.key(0))
    )
    x, t = (
        jnp.asarray(rng.normal(size=(4, positions, 8))),
        jnp.asarray(rng.normal(size=(4, positions, 5))),
    )
    source = fnn.source(net, loss)
    factors = jax.tree.leaves(source(params, x, t)[1], is_leaf=is_factor)[::2]
    through_gram = [f.fast_squared_norm().size is not None for f in factors]
    assert through_gram == [positions <= limit for limit in (4, 3)]

    @jax.jit
    def everything(params, x, t):
        arguments = (params, x, t)
        found = (
            norms(source)(*arguments),
            gram(source)(*arguments),
            inner_products(source)(params, (x, t), (x[:3, :2], t[:3, :2])),
        )
        tree = jax.vmap(lambda x, t: jax.grad(fnn.mean_loss(net, loss))(params, x[None], t[None]))
        return found, tree(x, t), tree(x[:3, :2], t[:3, :2])

    (found, matrix, inner), tree, other = everything(params, x, t)
    np.testing.assert_allclose(found, np.linalg.norm(flat(tree), axis=1), rtol=1e-12)
    agree(matrix, flat(tree) @ flat(tree).T)
    agree(inner, flat(tree) @ flat(other).T)


def test_a_noise_scale_of_one_example_that_counts_is_not_a_number(x64):
    """Whatever rounding makes of weight / weight: XLA may multiply by the inverse."""
    params, x, t = net_case(2)
    ask = jax.jit(noise_scale(SOURCE))
    for weight in np.random.default_rng(0).uniform(0.1, 2, 50):
        found = ask(params, x, t, weights=jnp.array([0.0, weight]))
        assert np.isnan([found.noise_scale, found.trace, found.squared_gradient]).all(), weight


def test_a_batch_of_one_example_has_no_variance_and_no_noise_scale(x64):
    params, x, t = net_case(1)
    found = moments(SOURCE)(params, x, t)
    assert all((leaf <= 1e-24).all() for leaf in wide(found.variance))
    with pytest.raises(ValueError, match="at least 2 examples"):
        noise_scale(SOURCE)(params, x, t)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)])
def test_the_estimates_of_noise_are_unbiased(x64, weights):
    """Over all ways to draw three examples of four, their mean is the covariance's trace and the
    squared gradient, exactly."""
    each = np.random.default_rng(0).normal(size=(4, 5)) + 1
    estimate = jax.jit(
        jax.vmap(
            lambda g: noise_scale(rows_as_gradients)(jnp.zeros(5), g, weights=jnp.asarray(weights))
        )
    )
    found = estimate(
        jnp.asarray([each[list(draw)] for draw in itertools.product(range(4), repeat=3)])
    )
    np.testing.assert_allclose(found.trace.mean(), each.var(0).sum(), rtol=1e-12)
    np.testing.assert_allclose(found.squared_gradient.mean(), (each.mean(0) ** 2).sum(), rtol=1e-12)


# Sources


def rows_as_gradients(params, x):
    """A source whose gradients are its rows."""
    return x.sum(1), PerExample(x)


def linear_model(params, x, t, scale):
    """No net in sight: |x w + b - t|^2 / 2 with a scale of every example's own."""
    e = scale[:, None] * (x @ params["w"] + jnp.broadcast_to(params["b"], t.shape) - t)
    return 0.5 * (e**2).sum(1) / scale, {"w": Outer(x, e), "b": PerExample(e)}


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, lambda f: lambda *arguments: f(*arguments)],
    ids=["plain", "jitted", "lambda"],
)
def test_a_source_is_any_function_jitted_or_not(x64, wrap):
    w, b, x, t, scale = (
        jnp.asarray(np.random.default_rng(0).normal(size=shape))
        for shape in ((3, 2), (2,), (5, 3), (5, 2), (5,))
    )
    params, batch = {"w": w, "b": b}, (x, t, scale**2 + 1)
    source = wrap(linear_model)
    tree = jax.vmap(
        jax.grad(lambda p, *one: linear_model(p, *(a[None] for a in one))[0][0]), (None, 0, 0, 0)
    )(params, *batch)
    g, share = flat(tree), np.full(5, 0.2)
    agree(gradients(source)(params, *batch), tree)
    agree(norms(source)(params, *batch), np.linalg.norm(g, axis=1))
    agree(gram(source)(params, *batch), g @ g.T)
    agree(
        clipped_gradient(source, 0.5)(params, *batch).gradient,
        together(tree, share * clip_to(0.5)(np.linalg.norm(g, axis=1))),
    )
    agree_with_moments(
        moments(source)(params, *batch), signal_to_noise(source)(params, *batch).ratio, tree, share
    )
    agree_with_noise_scale(noise_scale(source)(params, *batch), g, share)
    assert (
        int(top_examples(source, 1)(params, *batch).examples[0])
        == np.linalg.norm(g, axis=1).argmax()
    )


@pytest.mark.parametrize("statistic", [per_example.norms, per_example.moments, per_example.gram])
def test_a_gradient_is_no_source(statistic):
    net = fnn.mlp((3, 2))
    gradient = fnn.value_and_grad(net, losses.l2_loss)
    with pytest.raises(ValueError, match=r"`source` must return values \[batch\]"):
        statistic(gradient)(net.init(jax.random.key(0)), jnp.ones((2, 3)), jnp.ones((2, 2)))


def test_a_jitted_net_source_gives_what_the_net_gives(x64):
    params, x, t = net_case(6)
    for statistic in (norms, gradients, gram, moments):
        agree(
            jax.jit(statistic(jax.jit(SOURCE)))(params, x, t),
            jax.jit(statistic(SOURCE))(params, x, t),
        )


STATISTICS = {
    "gradients": gradients(SOURCE),
    "norms": norms(SOURCE),
    "top_examples": top_examples(SOURCE, 2),
    "gram": gram(SOURCE),
    "inner_products": lambda params, x, t: inner_products(SOURCE)(params, (x, t), (x, t)),
    "clipped_gradient": clipped_gradient(SOURCE, 1.0),
    "clipped per layer": clipped_gradient(SOURCE, 1.0, per_layer=True),
    "weighted_gradient": weighted_gradient(SOURCE),
    "moments": moments(SOURCE),
    "signal_to_noise": signal_to_noise(SOURCE),
    "noise_scale": noise_scale(SOURCE),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_second_call_does_not_compile_again_and_nothing_is_weakly_typed(name):
    params, x, t = cast(net_case(5), jnp.float32)
    f = jax.jit(chex.assert_max_traces(n=1)(STATISTICS[name]))
    first, second = f(params, x, t), f(params, 2 * x, t)
    chex.clear_trace_counter()
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(first))
    assert error(wide(first), wide(second)) > 1e-3


def test_norms_are_differentiable_backwards_and_clipped_gradients_forwards(x64):
    params, x, t = net_case(5)
    direction = net_case(5, seed=8)[0]
    mean = fnn.mean_loss(NET, losses.l2_loss)

    def by_vmap(params):
        return jax.vmap(lambda x, t: jax.grad(mean)(params, x[None], t[None]))(x, t)

    def squares(params):
        return sum((g**2).reshape(len(g), -1).sum(1) for g in jax.tree.leaves(by_vmap(params)))

    def clipped(params):
        factors = jnp.minimum(1, 3 / jnp.sqrt(squares(params))) / 5
        return jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), by_vmap(params))

    @jax.jit
    def both(params, direction):
        backwards = [
            jax.grad(lambda p, f=f: f(p).sum())(params)
            for f in (lambda p: norms(SOURCE)(p, x, t), lambda p: jnp.sqrt(squares(p)))
        ]
        ours = jax.jvp(
            lambda p: clipped_gradient(SOURCE, 3.0)(p, x, t).gradient, (params,), (direction,)
        )
        return (
            backwards,
            (ours, jax.jvp(clipped, (params,), (direction,))),
            jnp.sqrt(squares(params)),
        )

    backwards, forwards, sizes = both(params, direction)
    assert (sizes < 3).any()
    assert (sizes > 3).any()
    agree(*backwards)
    for ours, truth in zip(*forwards, strict=True):
        agree(ours, truth)


# Numerics


def moments_in_float64(g, share):
    """Mean and variance of gradients `[batch, ...]`."""
    mean = np.tensordot(share, g, 1)
    return mean, np.tensordot(share, (g - mean) ** 2, 1)


def around(*shape, seed):
    """1e3 + 1e-2 normal, in float32."""
    return jnp.asarray(
        (1e3 + 1e-2 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    )


SHARP = {  # the gradients are 1e3 +- 1e-2 times a number near 1
    "per example": lambda: PerExample(around(64, 5, seed=0)),
    "outer": lambda: Outer(around(64, 5, seed=0), jnp.ones((64, 3))),
    "outer, both": lambda: Outer(around(64, 5, seed=0), around(64, 3, seed=1)),
    "outer, few examples": lambda: Outer(around(3, 5, seed=0), jnp.ones((3, 4))),
    "stacked": lambda: Stacked(Outer(around(2, 64, 5, seed=0), jnp.ones((2, 64, 3)))),
    "outer, one position": lambda: Outer(around(64, 1, 5, seed=0), jnp.ones((64, 1, 3))),
    "scatter": lambda: Scatter(jnp.zeros(64, int), around(64, 5, seed=0), 1),
    "scatter, positions": lambda: Scatter(
        jnp.tile(jnp.arange(2), (64, 1)), around(64, 2, 5, seed=0), 2
    ),
}


@pytest.mark.parametrize("name", SHARP)
def test_the_variance_is_right_where_the_mean_is_a_hundred_thousand_times_the_spread(name):
    factor, batch = SHARP[name](), 3 if "few" in name else 64

    def source(params, factor):
        return jnp.zeros(batch), factor

    share = np.full(batch, 1 / batch)
    found = jax.jit(moments(source))(jnp.zeros(()), factor)
    with jax.enable_x64(True):
        g = np.asarray(cast(factor, jnp.float64).materialise())
    mean, variance = moments_in_float64(g, share)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
    short = g.astype(np.float32)
    naive = (short**2).mean(0) - short.mean(0) ** 2
    assert np.median(np.abs(naive - variance) / variance) > 1


def test_the_variance_of_a_net_with_inputs_of_1e3_is_that_of_its_gradients():
    """The net's own rounding is in its factors: the truth is the variance of these in float64."""
    net = fnn.mlp((6, 8, 3), "tanh")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32),
        jax.eval_shape(net.init, jax.random.key(0)),
    )
    params = jax.tree.map(lambda p: p * 1e-3, params[:1]) + params[1:]  # so that tanh is not flat
    x, t = around(64, 6, seed=1), jnp.asarray(rng.normal(size=(64, 3)) * 1e-3 + 5, jnp.float32)
    source, share = fnn.source(net, losses.l2_loss), np.full(64, 1 / 64)
    found = jax.jit(lambda *batch: (moments(source)(*batch), source(*batch)[1]))(params, x, t)
    with jax.enable_x64(True):
        each = jax.tree.map(
            lambda f: cast(f, jnp.float64).materialise(), found[1], is_leaf=is_factor
        )
    for ours, g in zip(wide(found[0].variance), wide(each), strict=True):
        _, variance = moments_in_float64(g, share)
        assert (variance > 0).all()
        np.testing.assert_allclose(ours, variance, rtol=1e-5)


EXTREMES = {
    "float32": (1e15, 1e-15, 1.0),
    "float16": (300.0, 6e-5, 6e4),
    "bfloat16": (1e15, 1e-15, 1.0),
}


@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_norms_and_clipping_hold_where_squares_leave_float16(dtype, which):
    size, rng = EXTREMES[dtype][which], np.random.default_rng(0)
    rounding = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 2e-2}[dtype]
    x = rng.uniform(-1, 1, (4, 7)) * np.array([[size], [size / 4], [size], [size]])
    x = jnp.asarray(x, dtype)
    g = np.asarray(x).astype(np.float64)
    n = np.linalg.norm(g, axis=1)
    assert np.asarray(norms(rows_as_gradients)(x[0], x)).dtype == np.float32
    np.testing.assert_allclose(norms(rows_as_gradients)(x[0], x), n, rtol=2e-6)
    bound = float(np.sort(n)[1] * 1.01)
    f = jax.jit(clipped_gradient(rows_as_gradients, bound, reduction="mean"))
    _, gradient, found = f(x[0], x)
    np.testing.assert_allclose(found, n, rtol=2e-6)
    assert gradient.dtype == dtype
    assert (
        error([np.asarray(gradient).astype(np.float64)], [(g * clip_to(bound)(n)[:, None]).mean(0)])
        <= rounding
    )
    unit = jax.jit(clipped_gradient(rows_as_gradients, scale=lambda n: 1 / n, reduction="mean"))(
        x[0], x
    ).gradient
    assert error([np.asarray(unit).astype(np.float64)], [(g / n[:, None]).mean(0)]) <= rounding
    scale = noise_scale(rows_as_gradients)(x[0], x).noise_scale
    small, big = (n**2).mean(), (g.mean(0) ** 2).sum()
    np.testing.assert_allclose(
        scale, (small - big) / (big - small / 4), rtol=1e-4 if dtype == "float32" else 5e-2
    )


@pytest.mark.parametrize(
    "sizes", [(1e15, 1.0, 1e-15), (1.0, 1e-12), (0.0, 1.0), (0.0, 0.0)], ids=str
)
def test_norms_of_very_different_examples_in_one_batch(sizes):
    x = jnp.asarray(np.array(sizes)[:, None] * np.array([[0.6, -0.8]]), jnp.float32)
    np.testing.assert_allclose(norms(rows_as_gradients)(x[0], x), sizes, rtol=1e-6)
    clipped = clipped_gradient(rows_as_gradients, 1.0)(x[0], x)
    np.testing.assert_allclose(clipped.norms, sizes, rtol=1e-6)


def test_a_norm_beyond_float32_is_infinite_and_its_example_left_out():
    x = jnp.array([[3e25, 4e25], [0.3, 0.4], [3e-30, 4e-30]])
    found = clipped_gradient(rows_as_gradients, 1.0)(x[0], x)
    np.testing.assert_allclose(found.norms, [np.inf, 0.5, 0.0], rtol=1e-6)
    assert found.reduction.non_finite.tolist() == [True, False, False]
    np.testing.assert_allclose(found.gradient, [0.15, 0.2], rtol=1e-6)


ask_norms = jax.jit(norms(SOURCE))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_net_in_a_short_dtype_has_the_statistics_of_float64(x64, dtype):
    c = net_case(9, scale=0.4)
    short = cast(c, dtype)
    found, truth = (
        {"norms": ask_norms(*batch)} | ask_robustly(NET)(*batch, np.ones(9))
        for batch in (short, cast(short, jnp.float64))
    )
    bound = {"float16": 1e-2, "bfloat16": 6e-2}[dtype]
    assert found["norms"].dtype == jnp.float32
    assert error(wide(found["norms"]), wide(truth["norms"])) <= bound
    for name in ("clipped", "per layer", "weighted"):
        assert {leaf.dtype for leaf in jax.tree.leaves(found[name].gradient)} == {jnp.dtype(dtype)}
        assert error(wide(found[name].gradient), wide(truth[name].gradient)) <= bound
    assert {
        leaf.dtype for leaf in jax.tree.leaves((found["moments"].mean, found["moments"].variance))
    } == {jnp.dtype("float32")}
    assert error(wide(found["moments"].variance), wide(truth["moments"].variance)) <= 2 * bound
    assert found["noise"].trace.dtype == jnp.float32
    np.testing.assert_allclose(found["noise"].trace, truth["noise"].trace, rtol=2 * bound)


def test_examples_that_are_not_finite_are_the_largest_and_are_told(x64):
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [jnp.nan, 0.0], [6.0, 8.0]])
    found = top_examples(rows_as_gradients, 3)(x[0], x)
    assert found.examples.tolist() == [2, 3, 0]
    assert np.isnan(found.norms[0])
    text = str(
        clipped_gradient(rows_as_gradients, 1.0)(
            x[0], x, weights=jnp.array([1.0, 0, 2, 3])
        ).reduction
    )
    assert text == (
        "mean over 2 of 4 examples, weights sum to 4; 1 left out because the gradient is not "
        "finite, the first in row 2"
    )


KERNEL_NETS = {
    "mlp": (fnn.mlp((5, 4, 3), "tanh"), (4, 5)),
    "positions": (fnn.mlp((5, 4, 3), "tanh"), (4, 2, 5)),
    "repeat": (fnn.serial(fnn.repeat(fnn.dense(5, 5), 2), fnn.activations.gelu), (4, 5)),
    "tied": (fnn.iterate(fnn.serial(fnn.dense(5, 5), fnn.activations.tanh), 2), (4, 5)),
    "norm": (fnn.serial(fnn.layer_norm(5), fnn.dense(5, 1)), (4, 5)),
}


@pytest.mark.parametrize("name", KERNEL_NETS)
def test_the_kernel_of_the_outputs_is_that_of_the_written_out_jacobian(x64, name):
    net, shape = KERNEL_NETS[name]
    params = jax.tree.map(lambda p: p + 0.1, net.init(jax.random.key(0)))
    params = cast(params, jnp.float64)
    rng = np.random.default_rng(4)
    x_a, x_b = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape)[:3])

    def jacobian(x):  # [batch, outputs, parameters]
        rows = jax.jacobian(lambda p: net.apply(p, x).reshape(len(x), -1))(params)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]
        return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], 2)

    full = np.einsum("aop,bqp->aboq", jacobian(x_a), jacobian(x_b))
    expected = {
        "full": full,
        "diagonal": np.einsum("aboo->abo", full),
        "trace": np.einsum("aboo->ab", full),
    }
    for outputs, kernel in expected.items():
        ours = jax.jit(ntk(net, outputs))(params, x_a, x_b)
        np.testing.assert_allclose(ours, kernel, rtol=1e-12, atol=1e-12 * abs(full).max())


def test_inner_products_of_two_losses_are_those_of_their_gradients(x64):
    net = fnn.mlp((5, 4, 3), "tanh")
    params = cast(net.init(jax.random.key(0)), jnp.float64)
    rng = np.random.default_rng(5)
    x, t, other = (jnp.asarray(rng.normal(size=shape)) for shape in ((4, 5), (4, 3), (3, 5)))
    labels = jnp.array([0, 2, 1])
    first = fnn.source(net, losses.huber_loss)
    second = fnn.source(net, losses.softmax_cross_entropy_with_integer_labels)
    ours = inner_products(first, second)(params, (x, t), (other, labels))
    a, b = gradients(first)(params, x, t), gradients(second)(params, other, labels)
    np.testing.assert_allclose(ours, flat(a) @ flat(b).T, rtol=1e-12)
    reverse = inner_products(second, first)(params, (other, labels), (x, t))
    np.testing.assert_allclose(reverse, ours.T, rtol=1e-12)
