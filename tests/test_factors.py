"""Factors and reducers: all the answers are those of the per-example gradients written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, case, cast, error, wide

import fnn
from fnn import per_example
from fnn.factors import (
    REDUCERS,
    Outer,
    PerExample,
    Scatter,
    Stacked,
    is_factor,
    keep,
    materialise,
    squared_norm,
    sum_positions,
    total,
)

CASES = (1, 4, 8, 10, 13, 17, 20, 22, 26, 28, 32, 35, 37, 41)  # each shape of SHAPES twice


def written_out(reducer, gradients):
    """A reducer's result for one parameter from its per-example gradients `[batch, ...]`."""
    square = (np.asarray(gradients) ** 2).reshape(len(gradients), -1).sum(1)
    return {
        "total": lambda g: g.sum(0),
        "materialise": lambda g: g,
        "norm": lambda g: np.sqrt(square),
        "squared_norm": lambda g: square,
        "second_moment": lambda g: (g**2).sum(0),
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


FACTORS = {
    "outer": outer(6),
    "outer of one example": outer(1),
    "outer without a batch axis": outer(),
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


def some_of(batch):
    """Weights `[batch]` of either sign, shares that add up to 1, and who is present.

    Every third is not, nor does it count.
    """
    rng, present = np.random.default_rng(9), np.arange(batch) % 3 != 1
    share = rng.uniform(0.1, 1, batch) * present
    return rng.normal(size=batch), share / share.sum(), present


def poisoned(factor, present):
    """NaN in every floating-point array where an example is not present."""
    depth = 0
    while isinstance(factor, Stacked):
        factor, depth = factor.factor, depth + 1

    def poison(a):
        if not jnp.issubdtype(a.dtype, jnp.floating) or a.ndim == 1:
            return a
        row = present.reshape(*(1,) * depth, -1, *(1,) * (a.ndim - depth - 1))
        return jnp.where(jnp.broadcast_to(row, a.shape), a, jnp.full_like(a, jnp.nan))

    factor = jax.tree.map(poison, factor)
    for _ in range(depth):
        factor = Stacked(factor)
    return factor


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


@by_name
def test_inner_products_and_moments_are_those_of_the_gradients_by_hand(x64, name):
    factor = FACTORS[name]()
    g = by_hand(factor)
    fewer = FACTORS[name](20).rows(0, max(1, len(g) - 1))
    other, (_, share, _) = by_hand(fewer), some_of(len(g))
    mean = np.tensordot(share, g, 1)
    truth = {
        "itself": np.tensordot(g.reshape(len(g), -1), g.reshape(len(g), -1), (1, 1)),
        "another": np.tensordot(g.reshape(len(g), -1), other.reshape(len(other), -1), (1, 1)),
        "moments": (mean, np.tensordot(share, (g - mean) ** 2, 1)),
        "quick": (g.reshape(len(g), -1) ** 2).sum(1),
    }

    @jax.jit
    def ask(factor, fewer, share):
        quick, lost = factor.quick_square()
        return {
            "itself": factor.inner(factor),
            "another": factor.inner(fewer),
            "moments": factor.moments(share),
            "quick": quick,
        }, lost

    found, lost = ask(factor, fewer, jnp.asarray(share))
    jax.tree.map(
        lambda mine, true: np.testing.assert_allclose(
            mine, true, rtol=1e-12, atol=1e-12, strict=True
        ),
        found,
        truth,
    )
    assert (lost > 0).all()
    assert (lost < 1e-290).all()


@by_name
def test_weights_masks_and_rows_are_those_of_the_gradients_by_hand(x64, name):
    factor = FACTORS[name]()
    g = by_hand(factor)
    weights, _, present = some_of(len(g))
    weighted = g * (weights * present).reshape(-1, *(1,) * (g.ndim - 1))
    first, size = len(g) // 3, len(g) - len(g) // 3
    truth = {
        "scaled": np.tensordot(weights, g, 1),
        "present": weighted,
        "masked": g * present.reshape(-1, *(1,) * (g.ndim - 1)),
        "masked total": weighted.sum(0),
        "rows": g[first : first + size],
    }

    @jax.jit
    def ask(factor, broken, weights, present, first):
        scaled = broken.scaled(weights, present)
        return {
            "scaled": factor.scaled(weights).total(),
            "present": factor.scaled(weights, present).materialise(),
            "masked": broken.masked(present).materialise(),
            "masked total": scaled.masked_total(present, jnp.full_like(factor.total(), 7.0)),
            "rows": factor.rows(first, size).materialise(),
        }

    found = ask(
        factor,
        poisoned(factor, jnp.asarray(present)),
        jnp.asarray(weights),
        jnp.asarray(present),
        first,
    )
    jax.tree.map(
        lambda mine, true: np.testing.assert_allclose(
            mine, true, rtol=1e-12, atol=1e-12, strict=True
        ),
        found,
        truth,
    )


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
def test_norms_hold_where_squares_leave_float32_and_the_quick_ones_say_so(x64, name):
    """Gradients of about `size` in float32, whether of one array or the product of two."""
    factor = FACTORS[name]()
    arrays = sum(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(factor))
    ask = jax.jit(lambda factor: (factor.norm(), *factor.quick_square()))
    for size in (1e-30, 1e-24, 1e-21, 1e-17, 1e-10, 1e-3, 1e17, 1e25, 1e36):
        scaled = jax.tree.map(
            lambda a, s=size ** (1 / arrays): a * s if jnp.issubdtype(a.dtype, jnp.floating) else a,
            factor,
        )
        scaled = cast(scaled, jnp.float32)
        norm, square, lost = (np.asarray(a, np.float64) for a in ask(scaled))
        truth = np.sqrt((by_hand(scaled).reshape(len(norm), -1) ** 2).sum(1))
        np.testing.assert_allclose(norm, truth, rtol=2e-6, err_msg=str(size))
        trusted = (square < np.inf) & (lost <= square * np.finfo(np.float32).eps)
        np.testing.assert_allclose(
            np.sqrt(square)[trusted], truth[trusted], rtol=2e-6, err_msg=str(size)
        )
        assert trusted.all() or not 1e-12 < size < 1e15, size  # the quick way is the usual way
        if np.isfinite(square).all():
            assert (np.abs(square - truth**2) <= lost + 4e-6 * truth**2).all(), size


@by_name
def test_methods_are_told_for_every_question_and_layer(name):
    factor = FACTORS[name]()
    found = jax.eval_shape(FACTORS[name]).methods()
    assert set(found) == {"total", "norm", "gram", "moments"}
    assert all(m.name and m.flops > 0 < m.bytes for m in found.values())
    if isinstance(factor, Stacked):
        one = jax.tree.map(lambda a: a[0], factor.factor).methods()
        layers = len(jax.tree.leaves(factor)[0])
        assert {k: (m.name, m.flops, m.bytes) for k, m in found.items()} == {
            k: (m.name, layers * m.flops, layers * m.bytes) for k, m in one.items()
        }


@by_name
def test_factors_keep_their_dtype_and_squares_are_wide(x64, name):
    factor = FACTORS[name]()
    found = jax.jit(
        lambda factor: {
            kind: [r(cast(factor, kind)) for r in REDUCERS]
            for kind in ("bfloat16", "float16", "float32", "float64")
        }
    )(factor)
    for dtype, results in found.items():
        wide_dtype = "float64" if dtype == "float64" else "float32"
        for reducer, result in zip(REDUCERS, results, strict=True):
            assert result.dtype == (
                wide_dtype if reducer.name in ("norm", "squared_norm", "second_moment") else dtype
            ), reducer.name
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


def test_norms_reach_both_ends_of_float32():
    """1 / 2e38 is a subnormal number, which XLA takes for 0."""
    np.testing.assert_allclose(
        PerExample(jnp.array([[2e38, 2e38], [3e-38, 4e-38], [0, 0]])).norm(),
        [2e38 * 2**0.5, 5e-38, 0],
        rtol=1e-6,
    )
    a, dz = jnp.full((1, 3, 9), 2e38), jnp.full((1, 3, 9), 1e-3)
    # not 6e38 on the way
    np.testing.assert_allclose(Outer(a, dz).norm(), [3 * 9 * 2e35], rtol=1e-6)
    np.testing.assert_allclose(
        Stacked(PerExample(jnp.full((2, 1, 1), 2e38))).norm(), [2e38 * 2**0.5], rtol=1e-6
    )


def test_a_weight_is_not_rounded_to_float16():
    gradient = jnp.full((2, 3), 300.0, jnp.float16)
    for f in (
        PerExample(gradient),
        Scatter(jnp.zeros(2, int), gradient, 2),
        Outer(jnp.ones((2, 1), jnp.float16), gradient),
    ):
        scaled = (
            f.scaled(jnp.array([1e-6, 1e-7]))
            .materialise()
            .max((1, 2) if f.materialise().ndim == 3 else 1)
        )
        assert scaled.dtype == jnp.float16
        np.testing.assert_allclose(scaled, [3e-4, 3e-5], rtol=2e-3)


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
    narrow = "optimization_barrier" in str(jax.make_jaxpr(f)(a[0], dz[0]))
    assert narrow == (batch >= 128 and out <= 16 < inputs and jax.default_backend() == "cpu")


def test_a_gram_matrix_of_few_positions_never_forms_the_gradient(x64):
    def sizes(positions):
        jaxpr = jax.make_jaxpr(squared_norm)(
            Outer(jnp.zeros((5, positions, 40)), jnp.zeros((5, positions, 30)))
        )
        return max(np.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars)

    assert sizes(3) < 5 * 40 * 30 == sizes(30)


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


def test_sum_positions_leaves_a_batch_of_features(x64):
    g = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(sum_positions(jnp.asarray(g)), g.sum(1))
    np.testing.assert_array_equal(sum_positions(jnp.asarray(g[0])), g[0])
    np.testing.assert_array_equal(sum_positions(jnp.asarray(g[0, 0])), g[0, :1])
    np.testing.assert_array_equal(
        sum_positions(jnp.asarray(g.reshape(2, 3, 2, 2))), g.reshape(2, 6, 2).sum(1)
    )


def test_the_reducers_have_names_of_their_own():
    assert [r.name for r in (*REDUCERS, keep)] == [
        "total",
        "materialise",
        "norm",
        "squared_norm",
        "second_moment",
        "keep",
    ]
    assert total in REDUCERS
    assert materialise in REDUCERS


def test_second_moment_does_not_underflow_in_float16():
    small = jnp.full((4, 3), 1e-4, jnp.float16)
    for factor in (Outer(jnp.ones((4, 2), jnp.float16), small), PerExample(small)):
        np.testing.assert_allclose(
            factor.second_moment(), 4e-8 * np.ones_like(factor.second_moment()), rtol=1e-2
        )
