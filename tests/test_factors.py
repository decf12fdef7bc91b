"""Factors and reducers: all the answers are those of the per-example gradients written out."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, case, cast, error, largest_array, wide

import fnn
from fnn import per_example
from fnn.factors import (
    REDUCERS,
    Conv,
    Layout,
    Mapped,
    Outer,
    PerExample,
    Same,
    Scatter,
    Stacked,
    Sum,
    View,
    Window,
    Zero,
    is_factor,
    keep,
    squared_norm,
)
from fnn.factors.base import fast_squared_norm

CASES = (1, 4, 8, 10, 13, 17, 20, 22, 26, 28, 32, 35, 37, 41)  # each shape of SHAPES twice


def written_out(reducer, gradients):
    """A reducer's result for one parameter from its per-example gradients `[batch, ...]`."""
    square = (np.asarray(gradients) ** 2).reshape(len(gradients), -1).sum(1)
    return {
        "total": lambda g: g.sum(0),
        "materialise": lambda g: g,
        "squared_norm": lambda g: square,
    }[reducer.name](np.asarray(gradients))


def close(ours, truth):
    """Leaf by leaf to 1e-12 of the leaf's size; what cancels to rounding is 0."""
    for mine, true in zip(wide(ours), wide(truth), strict=True):
        assert mine.shape == true.shape
        assert error([mine], [true]) <= 1e-12 or np.abs(mine - true).max() <= 1e-15


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def indices(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 5, shape))


def test_the_cases_hold_every_shape_twice():
    assert sorted(number // 3 % len(SHAPES) for number in CASES) == sorted(
        2 * list(range(len(SHAPES)))
    )


@pytest.mark.parametrize("number", CASES)
def test_reducing_within_the_backward_pass_is_reducing_its_factors(x64, number):
    c = case(number)
    source = fnn.source(c.net, c.loss)

    @jax.jit
    def everything(params, x, t):
        _, factors = source(params, x, t)
        return (
            [reducer.tree(factors) for reducer in REDUCERS],
            [source(params, x, t, reduce=reducer)[1] for reducer in REDUCERS],
            per_example.gradients(source)(params, x, t),
        )

    later, within, gradients = everything(c.params, c.x, c.targets)
    for reducer, one, other in zip(REDUCERS, later, within, strict=True):
        close(other, one)
        close(one, jax.tree.map(lambda g, r=reducer: written_out(r, g), gradients))


def outer(*shape, features=(5, 4)):
    """A maker of factors: `(seed) -> Outer` of `[*shape, features]`."""
    return lambda seed=0: Outer(
        normal(*shape, features[0], seed=seed), normal(*shape, features[1], seed=seed + 1)
    )


def scatter(*shape, size=5):
    return lambda seed=0: Scatter(
        indices(*shape, seed=seed), normal(*shape, 4, seed=seed + 1), size
    )


def conv(size, features, batch=5):
    """Of images with kernels of 2 x 2, one `[size, size, in]` for each example."""
    images, ones = (3, 0, 1, 2), (1, 1)
    window = Window(ones, ((0, 0), (0, 0)), ones, ones, (images, images, (2, 3, 0, 1)), 1)
    inputs, outputs = features
    return lambda seed=0: Conv(
        normal(batch, 1, size, size, inputs, seed=seed),
        normal(batch, 1, size - 1, size - 1, outputs, seed=seed + 1),
        window,
    )


def view(of, axes, order, shape):
    """A maker of views: the axes of a gradient in another order, as another shape."""
    return lambda seed=0: View(of(seed), Layout(axes, order, shape), jnp.dtype("float64"))


def times_mask(gradient, operands):
    return gradient * operands[0][0]


def mapped(of, *shape):
    """A maker of factors behind a map that is alike in all uses."""
    return lambda seed=0: Mapped(of(seed), {0: (normal(*shape, seed=7),)}, times_mask)


def same(*shape):
    return lambda seed=0: Same(normal(6, seed=seed), normal(*shape, seed=7))


def both(one, other):
    return lambda seed=0: Sum((one(seed), other(seed + 3)))


FACTORS = {
    "outer": outer(6),
    "outer of one example": outer(1),
    "outer, few positions": outer(6, 2),  # 2 (5 + 4) <= 1.2 * 5 * 4: through the Gram matrices
    "outer, just few enough": outer(6, 3, features=(5, 5)),
    "outer, many positions": outer(6, 7),  # through the matrix
    "outer, two axes of positions": outer(6, 2, 3),
    "outer, narrow": outer(150, features=(19, 3)),
    "outer, narrow, positions": outer(50, 3, features=(19, 3)),
    "outer, more than a block of columns": outer(3, features=(150, 2)),
    "outer, columns and positions": outer(3, 2, features=(100, 2)),
    "per example": lambda seed=0: PerExample(normal(6, 4, seed=seed)),
    "per example, matrix": lambda seed=0: PerExample(normal(6, 4, 3, seed=seed)),
    "scatter": scatter(4),
    "scatter, two positions": scatter(4, 2),  # 2 * 2 <= 5: through the pairs that meet
    "scatter, repeated": scatter(4, 3),
    "scatter, two axes of positions": scatter(4, 2, 3),
    "stacked": lambda seed=0: Stacked(outer(3, 6)(seed)),
    "stacked twice": lambda seed=0: Stacked(Stacked(outer(2, 3, 6)(seed))),
    "stacked, few positions": lambda seed=0: Stacked(Stacked(outer(2, 3, 6, 2)(seed))),
    "stacked, many positions": lambda seed=0: Stacked(outer(3, 6, 7)(seed)),
    "stacked, per example": lambda seed=0: Stacked(PerExample(normal(3, 6, 4, seed=seed))),
    "stacked, scatter": lambda seed=0: Stacked(scatter(2, 4, 3)(seed)),
    "conv": conv(4, (2, 3)),
    "conv, few positions": conv(3, (6, 5)),  # through the Gram matrices
    "view": view(outer(6), (5, 2, 2), (1, 0, 2), (2, 10)),
    "view of stacked": view(
        lambda seed=0: Stacked(outer(3, 6)(seed)), (3, 5, 4), (1, 0, 2), (5, 12)
    ),
    "mapped": mapped(outer(6), 5, 4),
    "mapped conv": mapped(conv(4, (2, 3)), 2, 2, 2, 3),
    "same": same(4, 3),
    "zero": lambda seed=0: Zero(jnp.zeros(6), (4, 3), jnp.dtype("float64")),
    "sum, with few positions": both(scatter(6, 2), outer(6, 2)),
    "sum, with few positions, of what all share": both(same(5, 4), outer(6)),
    "sum of what has no product": both(outer(6), mapped(outer(6), 5, 4)),
}
by_name = pytest.mark.parametrize("name", FACTORS)


def by_hand(factor):
    """The per-example gradients in NumPy's float64, example by example and position by position."""
    if isinstance(factor, Stacked):
        layers = len(jax.tree.leaves(factor)[0])
        return np.stack(
            [by_hand(jax.tree.map(lambda a, i=i: a[i], factor.factor)) for i in range(layers)], 1
        )
    if isinstance(factor, PerExample):
        return np.asarray(factor.gradient, np.float64)
    if type(factor) in MADE_OF_OTHERS:
        return MADE_OF_OTHERS[type(factor)](factor)
    if isinstance(factor, Conv):
        return conv_by_hand(factor)
    if isinstance(factor, Outer):
        a, dz = np.asarray(factor.a, np.float64), np.asarray(factor.dz, np.float64)
        if a.ndim == 1:
            return np.outer(a, dz)[None]
        pairs = [
            (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            for x, y in zip(a, dz, strict=True)
        ]
        return np.stack([sum(np.outer(u, v) for u, v in zip(x, y, strict=True)) for x, y in pairs])
    out = np.zeros((len(factor.index), factor.size, factor.dy.shape[-1]))
    for i, (rows, dy) in enumerate(
        zip(np.asarray(factor.index), np.asarray(factor.dy, np.float64), strict=True)
    ):
        for row, g in zip(np.ravel(rows), dy.reshape(-1, dy.shape[-1]), strict=True):
            out[i, row] += g
    return out


def conv_by_hand(factor):
    """The sum over positions of what a kernel of 2 x 2 sees of `x`, times `dz`."""
    x, dz = (np.asarray(a, np.float64)[:, 0] for a in (factor.x, factor.dz))
    size = dz.shape[1]
    seen = [[x[:, i : i + size, j : j + size] for j in (0, 1)] for i in (0, 1)]
    return np.einsum("hwbxyi,bxyo->bhwio", np.array(seen), dz)


MADE_OF_OTHERS = {
    View: lambda f: np.stack([f.layout(g) for g in by_hand(f.of)]),
    Mapped: lambda f: by_hand(f.of) * np.asarray(f.operands[0][0], np.float64),
    Sum: lambda f: sum(map(by_hand, f.parts)),
    Same: lambda f: np.multiply.outer(
        *(np.asarray(a, np.float64) for a in (f.weights, f.gradient))
    ),
    Zero: lambda f: np.zeros((len(f.weights), *f.shape)),
}


def some_of(batch):
    """Weights `[batch]` of either sign, shares that add up to 1, and who is present.

    Every third is not, nor does it count.
    """
    rng, present = np.random.default_rng(9), np.arange(batch) % 3 != 1
    share = rng.uniform(0.1, 1, batch) * present
    return rng.normal(size=batch), share / share.sum(), present


def poisoned(factor, present, depth=0):
    """NaN in every floating-point array where an example is not present."""
    if isinstance(factor, Stacked):
        return Stacked(poisoned(factor.factor, present, depth + 1))
    if isinstance(factor, (View, Mapped)):
        return replace(factor, of=poisoned(factor.of, present, depth))
    if isinstance(factor, Sum):
        return Sum(tuple(poisoned(f, present, depth) for f in factor.parts))
    if isinstance(factor, (Same, Zero)):
        return replace(factor, weights=jnp.where(present, factor.weights, jnp.nan))

    def poison(a):
        if not jnp.issubdtype(a.dtype, jnp.floating) or a.ndim == 1:
            return a
        row = present.reshape(*(1,) * depth, -1, *(1,) * (a.ndim - depth - 1))
        return jnp.where(jnp.broadcast_to(row, a.shape), a, jnp.full_like(a, jnp.nan))

    return jax.tree.map(poison, factor)


def as_dtype(factor, dtype):
    """A factor in another dtype, and those that it is made of."""
    if isinstance(factor, View):
        return View(as_dtype(factor.of, dtype), factor.layout, jnp.dtype(dtype))
    if isinstance(factor, Zero):
        return replace(cast(factor, dtype), dtype=jnp.dtype(dtype))
    return cast(factor, dtype)


@by_name
def test_every_factor_answers_as_its_gradients_by_hand(x64, name):
    factor = FACTORS[name]()
    assert is_factor(factor)
    truth = by_hand(factor)
    found = jax.jit(lambda factor: [reducer(factor) for reducer in REDUCERS])(factor)
    for reducer, result in zip(REDUCERS, found, strict=True):
        np.testing.assert_allclose(
            result,
            written_out(reducer, truth),
            rtol=1e-12,
            atol=1e-12,
            err_msg=reducer.name,
            strict=True,
        )


def assert_close(found, truth):
    jax.tree.map(
        lambda ours, true: np.testing.assert_allclose(
            ours, true, rtol=1e-12, atol=1e-12, strict=True
        ),
        found,
        truth,
    )


@by_name
def test_inner_products_are_those_of_the_gradients_by_hand(x64, name):
    factor, other = FACTORS[name](), FACTORS[name](20)
    flat, other_flat = (by_hand(f).reshape(len(by_hand(f)), -1) for f in (factor, other))
    found = jax.jit(lambda f, g: (f.inner(f), f.inner(g)))(factor, other)
    assert_close(found, (flat @ flat.T, flat @ other_flat.T))


@by_name
def test_moments_are_those_of_the_gradients_by_hand_without_what_has_no_share(x64, name):
    factor = FACTORS[name]()
    g = by_hand(factor)
    _, share, present = some_of(len(g))
    mean = np.tensordot(share, g, 1)
    variance = np.tensordot(share, (g - mean) ** 2, 1)

    @jax.jit
    def ask(factor, broken, share):
        return {
            "moments": factor.moments(share),
            "broken": broken.moments(share),
            "raw": broken.raw_moments(share),
        }

    found = ask(factor, poisoned(factor, jnp.asarray(present)), jnp.asarray(share))
    if found["raw"] is not None:
        found["raw"] = found["raw"][0], found["raw"][1] - found["raw"][0] ** 2
    truth = {"moments": (mean, variance), "broken": (mean, variance)}
    assert_close(found, truth | {"raw": found["raw"] and (mean, variance)})


@by_name
def test_moments_of_no_example_are_zero(x64, name):
    factor = FACTORS[name]()
    found = factor.moments(jnp.zeros(len(by_hand(factor))))
    assert all((np.asarray(leaf) == 0).all() for leaf in found)


@by_name
def test_fast_squares_are_the_squares_and_their_size_is_not_less(x64, name):
    factor = FACTORS[name]()
    square = (by_hand(factor).reshape(len(by_hand(factor)), -1) ** 2).sum(1)
    found = jax.jit(fast_squared_norm)(factor)
    np.testing.assert_allclose(found.value, square, rtol=1e-12)
    few = ("few positions", "just few", "narrow, positions", "columns and positions")
    assert (found.size is not None) == any(words in name for words in few)
    if found.size is not None:
        assert (np.asarray(found.size) >= square * (1 - 1e-12)).all()


@by_name
def test_a_weight_of_zero_leaves_an_example_out_whatever_it_holds(x64, name):
    factor = FACTORS[name]()
    g = by_hand(factor)
    weights, _, present = some_of(len(g))
    broken = poisoned(factor, jnp.asarray(present))

    @jax.jit
    def ask(factor, broken, weights, present):
        kept = jnp.where(present, weights, 0)
        return factor.scaled(weights).total(), broken.exact_total(kept)

    found = ask(factor, broken, jnp.asarray(weights), jnp.asarray(present))
    without = np.tensordot(weights * present, g, 1)
    assert_close(found, (np.tensordot(weights, g, 1), without))


@by_name
def test_a_merged_factor_is_of_the_sum_over_uses(x64, name):
    uses = [FACTORS[name](seed) for seed in (0, 20, 40)]
    merged = jax.tree.map(lambda *arrays: jnp.stack(arrays), *uses).merged()
    assert type(merged) is type(uses[0])
    truth = sum(by_hand(use) for use in uses)
    found = jax.jit(lambda merged: [reducer(merged) for reducer in REDUCERS])(merged)
    for reducer, result in zip(REDUCERS, found, strict=True):
        np.testing.assert_allclose(
            result,
            written_out(reducer, truth),
            rtol=1e-12,
            atol=1e-12,
            err_msg=reducer.name,
            strict=True,
        )


@by_name
def test_stacked_factors_take_a_weight_per_layer_and_others_one_per_example(x64, name):
    factor = FACTORS[name]()
    g = by_hand(factor)
    depth = 1 if isinstance(factor, Stacked) else 0
    depth += bool(depth) and isinstance(factor.factor, Stacked)
    # [layers, batch]
    weights = np.random.default_rng(5).normal(size=(*g.shape[1 : 1 + depth], len(g)))
    spread = np.moveaxis(weights, -1, 0).reshape(
        *g.shape[: 1 + depth], *(1,) * (g.ndim - 1 - depth)
    )
    total = jax.jit(lambda factor, weights: factor.scaled(weights).total())(
        factor, jnp.asarray(weights)
    )
    np.testing.assert_allclose(total, (g * spread).sum(0), rtol=1e-12, atol=1e-12)


@by_name
def test_squares_hold_from_1e_minus_30_to_1e30_in_float32(x64, name):
    """Of the size of the gradient, whether of one array or the product of two."""
    factor = FACTORS[name]()
    arrays = sum(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(factor))
    ask = jax.jit(lambda factor: (squared_norm(factor), fast_squared_norm(factor)))
    for size in (1e-15, 1e-10, 1e-3, 1e10, 1e15):
        each = size ** (1 / arrays)
        scaled = jax.tree.map(
            lambda a, s=each: a * s if jnp.issubdtype(a.dtype, jnp.floating) else a, factor
        )
        scaled = cast(scaled, jnp.float32)
        square, fast = ask(scaled)
        truth = (by_hand(scaled).reshape(len(square), -1) ** 2).sum(1)
        np.testing.assert_allclose(square, truth, rtol=4e-6, err_msg=str(size))
        few = np.ones(len(truth), bool) if fast.size is None else fast.size <= 8 * fast.value
        np.testing.assert_allclose(fast.value[few], truth[few], rtol=4e-6, err_msg=str(size))


@by_name
def test_factors_keep_their_dtype_and_squares_are_wide(x64, name):
    factor = FACTORS[name]()
    found = jax.jit(
        lambda factor: {
            kind: [r(as_dtype(factor, kind)) for r in REDUCERS]
            for kind in ("bfloat16", "float16", "float32", "float64")
        }
    )(factor)
    for dtype, results in found.items():
        wide_dtype = "float64" if dtype == "float64" else "float32"
        for reducer, result in zip(REDUCERS, results, strict=True):
            assert result.dtype == (wide_dtype if reducer.name == "squared_norm" else dtype), (
                reducer.name
            )
            assert not result.weak_type


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("positions", [(), (2,), (9,)])
def test_norms_of_large_short_gradients_do_not_overflow(dtype, positions):
    """600^2 is beyond float16; so is its sum."""
    one = Outer(
        jnp.full((2, *positions, 8), 20.0, dtype), jnp.full((2, *positions, 4), 30.0, dtype)
    )
    norms = squared_norm(one)
    each = 600.0 * np.prod(positions, initial=1)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, [32 * each**2] * 2, rtol=2e-2)


def test_a_weight_is_not_rounded_to_float16():
    gradient = jnp.full((2, 3), 300.0, jnp.float16)
    for f in (
        PerExample(gradient),
        Scatter(jnp.zeros(2, int), gradient, 2),
        Outer(jnp.ones((2, 1), jnp.float16), gradient),
    ):
        scaled = f.scaled(jnp.array([1e-6, 1e-7])).materialise().reshape(2, -1).max(1)
        assert scaled.dtype == jnp.float32
        np.testing.assert_allclose(scaled, [3e-4, 3e-5], rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "inputs", "out"),
    [(128, 17, 16), (128, 17, 1), (128, 16, 16), (127, 17, 16), (128, 20, 17)],
)
def test_the_narrow_product_is_the_product_also_under_vmap_and_grad(x64, batch, inputs, out):
    """At and beyond the border of the branch."""
    a, dz = normal(2, batch, inputs), normal(2, batch, out, seed=1)

    def f(a, dz):
        return Outer(a, dz).total()

    def scalar(product):
        return lambda a, dz: jnp.sin(product(a, dz)).sum()

    @jax.jit
    def both(a, dz):
        return [
            (
                product(a[0], dz[0]),
                jax.vmap(product)(a, dz),
                jax.grad(scalar(product), (0, 1))(a[0], dz[0]),
            )
            for product in (f, lambda a, dz: a.T @ dz)
        ]

    close(*both(a, dz))
    narrow = "reduce_precision" in str(jax.make_jaxpr(f)(a[0], dz[0]))
    assert narrow == (out <= 16 < inputs and jax.default_backend() == "cpu")


@pytest.mark.parametrize("positions", [3, 30])
@pytest.mark.parametrize("reducer", [squared_norm, fast_squared_norm], ids=lambda r: r.name)
def test_squares_with_positions_never_form_the_gradients(reducer, positions):
    factor = Outer(jnp.zeros((5, positions, 400)), jnp.zeros((5, positions, 300)))
    assert largest_array(reducer, factor) <= 5 * positions * 400
    table = Scatter(jnp.zeros((5, positions), int), jnp.zeros((5, positions, 64)), 5000)
    assert largest_array(reducer, table) <= max(5 * positions * 64, 5 * positions**2)


def test_exact_totals_and_moments_never_form_the_gradients():
    factor, share = Outer(jnp.zeros((50, 40)), jnp.zeros((50, 30))), jnp.full(50, 0.02)
    assert largest_array(lambda f: f.exact_total(share), factor) == 40 * 30
    assert largest_array(lambda f: f.moments(share), factor) == 40 * 30


@pytest.mark.parametrize("depth", [1, 2])
def test_kept_factors_of_repeat_are_stacked_and_answer_as_backward_does(x64, depth):
    block = fnn.residual(fnn.serial(fnn.dense(4, 4), fnn.activations.tanh, fnn.layer_norm(4)))
    net = fnn.repeat(block, 3) if depth == 1 else fnn.repeat(fnn.repeat(block, 3), 2)

    @jax.jit
    def both(params, x):
        y, residuals = net.forward(params, x)
        factors, dx = net.backward(params, residuals, jnp.cos(y), keep)
        assert all(isinstance(f, Stacked) for f in jax.tree.leaves(factors, is_leaf=is_factor))
        assert isinstance(factors[0].w.factor, Outer if depth == 1 else Stacked)
        return [
            ((reducer.tree(factors), dx), net.backward(params, residuals, jnp.cos(y), reducer))
            for reducer in REDUCERS
        ]

    params = jax.tree.map(lambda p: p.astype(jnp.float64), net.init(jax.random.key(0)))
    for kept, at_once in both(params, normal(5, 2, 4)):
        close(kept, at_once)


def test_keep_returns_what_it_is_given():
    factor = PerExample(jnp.arange(6.0).reshape(2, 3))
    for given in (factor, Stacked(factor)):
        chex.assert_trees_all_equal(keep(given), given)


@pytest.mark.parametrize("index", [5, -1])
@pytest.mark.parametrize("rest", [[], [0], [0, 2, 0]])
def test_an_index_out_of_range_counts_nothing(index, rest):
    rng = np.random.default_rng(0)
    dy = jnp.float32(rng.normal(size=(2, 1 + len(rest), 20)))
    f = Scatter(jnp.array([[index, *rest]] * 2), dy, 3)
    g = np.zeros((2, 3, 20))
    for position, row in enumerate(rest, 1):
        g[:, row] += dy[:, position]
    flat = g.reshape(2, -1)
    ones = jnp.ones(2)
    found = f.total(), f.exact_total(ones), f.materialise(), f.squared_norm(), f.inner(f)
    truth = g.sum(0), g.sum(0), g, (flat**2).sum(1), flat @ flat.T
    chex.assert_trees_all_close(found, jax.tree.map(jnp.float32, truth), rtol=1e-5, atol=1e-6)


def test_a_factor_names_the_methods_that_it_lacks():
    class Half(fnn.factors.Factor):
        def total(self):
            return jnp.zeros(3)

    with pytest.raises(TypeError, match=r"materialise.*merged.*scaled"):
        Half()
