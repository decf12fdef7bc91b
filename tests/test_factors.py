"""Factors, reducers and per-example statistics: all the answers are those of the per-example gradients written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, case, cast, error, fast_jit, wide

import fnn
from fnn import per_example
from fnn.factors import REDUCERS, Outer, PerExample, Scatter, Stacked, is_factor, keep, materialise, squared_norm, sum_positions, total

CASES = (1, 4, 8, 10, 13, 17, 20, 22, 26, 28, 32, 35)  # each shape of SHAPES twice


def written_out(reducer, gradients):
    """A reducer's result for one parameter from its per-example gradients `[batch, ...]`."""
    return {
        "total": lambda g: g.sum(0),
        "materialise": lambda g: g,
        "squared_norm": lambda g: (g**2).sum(tuple(range(1, g.ndim))),
        "second_moment": lambda g: (g**2).sum(0),
    }[reducer.name](np.asarray(gradients))


def close(ours, truth):
    """Leaf by leaf to 1e-12 of the leaf's size; what cancels to rounding is 0."""
    for mine, true in zip(wide(ours), wide(truth), strict=True):
        assert mine.shape == true.shape
        assert error([mine], [true]) <= 1e-12 or np.abs(mine - true).max() <= 1e-15


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def test_the_cases_hold_every_shape_twice():
    assert sorted(number // 3 % len(SHAPES) for number in CASES) == sorted(2 * list(range(len(SHAPES))))


@pytest.mark.parametrize("number", CASES)
def test_every_statistic_is_that_of_the_per_example_gradients(x64, number):
    c = case(number)
    source, f = fnn.factors(c.net, c.loss), fnn.value_and_grad(c.net, c.loss)
    mean = fnn.mean_loss(c.net, c.loss)

    @fast_jit
    def everything(params, x, t):
        def one(x, t):
            return jax.value_and_grad(mean)(params, x[None], t[None])

        values, factors = source(params, x, t)
        outputs, residuals = c.net.forward(params, x)
        dy = c.loss.grad(outputs, t)
        return {
            "values": values,
            "reduced later": [reducer.tree(factors) for reducer in REDUCERS],
            "reduced in backward": [c.net.backward(params, residuals, dy, reducer)[0] for reducer in REDUCERS],
            "batch": f(params, x, t)[1],
            "gradients": per_example.gradients(source)(params, x, t),
            "norms": per_example.norms(source)(params, x, t),
            "norms of gradients": per_example.norms_of(per_example.gradients(source)(params, x, t)),
            "by vmap": per_example.by_vmap(f)(params, x, t),
            "jax": jax.vmap(one)(x, t),
        }

    found = everything(c.params, c.x, c.targets)
    values, truth = found["jax"]
    close((found["values"], found["gradients"]), (values, truth))
    close(found["by vmap"], (values, truth))
    close(found["norms"], found["norms of gradients"])
    np.testing.assert_allclose(found["norms"], np.sqrt(sum((g**2).reshape(len(g), -1).sum(1) for g in wide(truth))), rtol=1e-12)
    close(jax.tree.map(lambda g: g * len(c.x), found["batch"]), jax.tree.map(lambda g: g.sum(0), found["gradients"]))
    for reducer, later, within in zip(REDUCERS, found["reduced later"], found["reduced in backward"], strict=True):
        close(within, later)
        close(later, jax.tree.map(lambda g, r=reducer: written_out(r, g), found["gradients"]))


FACTORS = {
    "outer": lambda: Outer(normal(6, 5), normal(6, 4, seed=1)),
    "outer of one example": lambda: Outer(normal(1, 5), normal(1, 4, seed=1)),
    "outer without a batch axis": lambda: Outer(normal(5), normal(4, seed=1)),
    "outer, few positions": lambda: Outer(normal(6, 2, 5), normal(6, 2, 4, seed=1)),  # 2 * 2^2 <= 5 * 4: through the Gram matrices
    "outer, just few enough": lambda: Outer(normal(6, 3, 6), normal(6, 3, 3, seed=1)),
    "outer, many positions": lambda: Outer(normal(6, 7, 5), normal(6, 7, 4, seed=1)),  # 2 * 7^2 > 5 * 4: through the matrix
    "outer, two axes of positions": lambda: Outer(normal(6, 2, 3, 5), normal(6, 2, 3, 4, seed=1)),
    "outer, narrow": lambda: Outer(normal(150, 9), normal(150, 3, seed=1)),
    "outer, narrow, positions": lambda: Outer(normal(50, 3, 9), normal(50, 3, 3, seed=1)),
    "per example": lambda: PerExample(normal(6, 4)),
    "per example, matrix": lambda: PerExample(normal(6, 4, 3)),
    "scatter": lambda: Scatter(jnp.array([2, 0, 2]), normal(3, 4), 5),
    "scatter, repeated": lambda: Scatter(jnp.array([[2, 2, 0], [1, 1, 1], [4, 3, 2]]), normal(3, 3, 4), 5),
}


def by_hand(factor):
    """The per-example gradients in NumPy, example by example and position by position."""
    if isinstance(factor, PerExample):
        return np.asarray(factor.gradient)
    if isinstance(factor, Outer):
        a, dz = np.asarray(factor.a), np.asarray(factor.dz)
        if a.ndim == 1:
            return np.outer(a, dz)[None]
        pairs = [(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in zip(a, dz, strict=True)]
        return np.stack([sum(np.outer(u, v) for u, v in zip(x, y, strict=True)) for x, y in pairs])
    out = np.zeros((len(factor.index), factor.size, factor.dy.shape[-1]))
    for i, (rows, dy) in enumerate(zip(np.asarray(factor.index), np.asarray(factor.dy), strict=True)):
        for row, g in zip(np.atleast_1d(rows), dy.reshape(-1, dy.shape[-1]), strict=True):
            out[i, row] += g
    return out


@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_answers_as_its_gradients_by_hand(x64, name):
    factor = FACTORS[name]()
    assert is_factor(factor)
    truth = by_hand(factor)
    found = fast_jit(lambda factor: [reducer(factor) for reducer in REDUCERS])(factor)
    for reducer, result in zip(REDUCERS, found, strict=True):
        np.testing.assert_allclose(result, written_out(reducer, truth), rtol=1e-12, atol=1e-12, err_msg=reducer.name, strict=True)


@pytest.mark.parametrize("name", FACTORS)
def test_factors_keep_their_dtype_and_squares_are_wide(x64, name):
    factor = FACTORS[name]()
    found = fast_jit(
        lambda factor: {kind: [r(cast(factor, kind)) for r in REDUCERS] for kind in ("bfloat16", "float16", "float32", "float64")}
    )(factor)
    for dtype, results in found.items():
        wide_dtype = "float64" if dtype == "float64" else "float32"
        for reducer, result in zip(REDUCERS, results, strict=True):
            assert result.dtype == (wide_dtype if reducer.name in ("squared_norm", "second_moment") else dtype), reducer.name
            assert not result.weak_type


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("positions", [(), (2,), (9,)])
def test_norms_of_large_short_gradients_do_not_overflow(dtype, positions):
    """600^2 is beyond float16; so is its sum."""
    one = Outer(jnp.full((2, *positions, 8), 20.0, dtype), jnp.full((2, *positions, 4), 30.0, dtype))
    norms = squared_norm(one)
    each = 600.0 * np.prod(positions, initial=1)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, [32 * each**2] * 2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_a_net_in_short_dtypes_are_float32_and_finite(x64, dtype):
    c = case(9)
    batch = cast((c.params, c.x, c.targets), dtype)
    f = per_example.norms(fnn.factors(c.net, c.loss))
    norms, truth = fast_jit(lambda short, long: (f(*short), f(*long)))(batch, (c.params, c.x, c.targets))
    assert norms.dtype == jnp.float32
    assert error(wide(norms), wide(truth)) <= 5e-2


@pytest.mark.parametrize(("batch", "out"), [(128, 16), (128, 1), (127, 16), (128, 17)])  # at and beyond the border of the branch
def test_the_narrow_product_is_the_product_also_under_vmap_and_grad(x64, batch, out):
    a, dz = normal(2, batch, 6), normal(2, batch, out, seed=1)

    def f(a, dz):
        return Outer(a, dz).total()

    def scalar(product):
        return lambda a, dz: jnp.sin(product(a, dz)).sum()

    @fast_jit
    def both(a, dz):
        return [
            (product(a[0], dz[0]), jax.vmap(product)(a, dz), jax.grad(scalar(product), (0, 1))(a[0], dz[0]))
            for product in (f, lambda a, dz: a.T @ dz)
        ]

    close(*both(a, dz))
    narrow = "optimization_barrier" in str(jax.make_jaxpr(f)(a[0], dz[0]))
    assert narrow == (batch >= 128 and out <= 16 and jax.default_backend() == "cpu")


def test_a_gram_matrix_of_few_positions_never_forms_the_gradient(x64):
    def sizes(positions):
        jaxpr = jax.make_jaxpr(squared_norm)(Outer(jnp.zeros((5, positions, 40)), jnp.zeros((5, positions, 30))))
        return max(np.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars)

    assert sizes(3) < 5 * 40 * 30 == sizes(30)


@pytest.mark.parametrize("depth", [1, 2])
def test_kept_factors_of_repeat_are_stacked_and_answer_as_backward_does(x64, depth):
    block = fnn.residual(fnn.serial(fnn.dense(4, 4), fnn.activations.tanh, fnn.layer_norm(4)))
    net = fnn.repeat(block, 3) if depth == 1 else fnn.repeat(fnn.repeat(block, 3), 2)

    @fast_jit
    def both(params, x):
        y, residuals = net.forward(params, x)
        factors, dx = net.backward(params, residuals, jnp.cos(y), keep)
        assert all(isinstance(f, Stacked) for f in jax.tree.leaves(factors, is_leaf=is_factor))
        assert isinstance(factors[0].w.factor, Outer if depth == 1 else Stacked)
        return [((reducer.tree(factors), dx), net.backward(params, residuals, jnp.cos(y), reducer)) for reducer in REDUCERS]

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
    np.testing.assert_array_equal(sum_positions(jnp.asarray(g.reshape(2, 3, 2, 2))), g.reshape(2, 6, 2).sum(1))


def test_a_source_is_any_function(x64):
    """A linear model written as a formula, no net in sight: |x w - t|^2 / 2 with a batch of three arrays."""

    def source(params, x, t, scale):
        e = scale[:, None] * (x @ params["w"] + jnp.broadcast_to(params["b"], t.shape) - t)
        values = 0.5 * (e**2).sum(1) / scale
        return values, {"w": Outer(x, e), "b": PerExample(e)}

    params, batch = {"w": normal(3, 2), "b": normal(2, seed=1)}, (normal(5, 3, seed=2), normal(5, 2, seed=3), normal(5, seed=4) ** 2 + 1)

    @fast_jit
    def both(params, *batch):
        automatic = jax.vmap(jax.grad(lambda p, *one: source(p, *(leaf[None] for leaf in one))[0][0]), (None, 0, 0, 0))(params, *batch)
        return per_example.gradients(source)(params, *batch), automatic, per_example.norms(source)(params, *batch)

    gradients, automatic, norms = both(params, *batch)
    close(gradients, automatic)
    close(norms, per_example.norms_of(automatic))


def test_norms_of_are_float32_for_short_gradients():
    tree = (jnp.full((2, 4), 300.0, jnp.float16), jnp.zeros((2, 3, 3), jnp.float16))
    norms = per_example.norms_of(tree)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, [600, 600])


def test_the_reducers_have_names_of_their_own():
    assert [r.name for r in (*REDUCERS, keep)] == ["total", "materialise", "squared_norm", "second_moment", "keep"]
    assert total in REDUCERS
    assert materialise in REDUCERS


def test_second_moment_does_not_underflow_in_float16():
    small = jnp.full((4, 3), 1e-4, jnp.float16)
    for factor in (Outer(jnp.ones((4, 2), jnp.float16), small), PerExample(small)):
        np.testing.assert_allclose(factor.second_moment(), 4e-8 * np.ones_like(factor.second_moment()), rtol=1e-2)
