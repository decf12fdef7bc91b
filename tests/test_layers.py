"""Layers, combinators and whole nets: one property, every layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide

import fnn
from fnn.factors import REDUCERS, keep, materialise
from fnn.nets.activations import gelu, identity, relu, softmax, step, tanh
from fnn.nets.layers import Dense, Embedding, Norm

BLOCK = fnn.serial(fnn.dense(4, 4), tanh)
LAYERS = {  # all take and give [..., 4] or [..., 3], the embedding whole numbers below 7
    "dense": fnn.dense(4, 3),
    "dense without a bias": fnn.dense(4, 3, bias_init=None),
    "layer_norm": fnn.layer_norm(4),
    "rms_norm": fnn.rms_norm(4),
    "embedding": fnn.embedding(7, 4),
    "activation": gelu,
    "softmax": softmax,
    "serial": fnn.serial(fnn.dense(4, 5), tanh, fnn.dense(5, 3)),
    "serial of nothing": fnn.serial(),
    "serial in serial": fnn.serial(
        fnn.dense(4, 5), fnn.serial(tanh, fnn.serial(fnn.dense(5, 3), identity))
    ),
    "residual": fnn.residual(BLOCK),
    "residual in residual": fnn.residual(fnn.serial(fnn.residual(BLOCK), fnn.rms_norm(4))),
    "repeat": fnn.repeat(BLOCK, 3),
    "repeat once": fnn.repeat(BLOCK, 1),
    "repeat in repeat": fnn.repeat(fnn.repeat(fnn.residual(BLOCK), 2), 3),
    "repeat of no parameters": fnn.repeat(tanh, 2),
    "iterate": fnn.iterate(BLOCK, 3),
    "iterate once": fnn.iterate(BLOCK, 1),
    "iterate of residual and norm": fnn.iterate(
        fnn.residual(fnn.serial(fnn.rms_norm(4), fnn.dense(4, 4))), 2
    ),
    "iterate in repeat": fnn.repeat(fnn.iterate(fnn.residual(BLOCK), 2), 3),
    "repeat in iterate": fnn.iterate(fnn.repeat(fnn.residual(BLOCK), 2), 3),
    "iterate in iterate": fnn.iterate(fnn.iterate(fnn.residual(BLOCK), 2), 2),
    "iterate of no parameters": fnn.iterate(tanh, 2),
    "mlp": fnn.mlp((4, 5, 5, 3), gelu),
}
SHAPES = {0: (), 1: (6,), 2: (2, 3)}
by_layer = pytest.mark.parametrize("name", LAYERS)


def params_of(layer, seed=0):
    """Random numbers for every parameter, biases and scales too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)),
        jax.eval_shape(layer.init, jax.random.key(0)),
    )


def x_for(name, leading=(6,)):
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.integers(0, 7, leading))
        if name == "embedding"
        else jnp.asarray(rng.normal(size=(*leading, 4)))
    )


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@by_layer
def test_leading_axes_are_free(x64, name):
    layer, rows = LAYERS[name], x_for(name)
    feature_axes = rows.shape[1:]

    @jax.jit
    def apply(params, rows):
        return (
            layer.apply(params, rows),
            layer.apply(params, rows.reshape(2, 3, *feature_axes)),
            jnp.stack([layer.apply(params, row) for row in rows]),
        )

    once, twice, apart = apply(params_of(layer), rows)
    np.testing.assert_allclose(twice.reshape(once.shape), once, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(apart, once, rtol=1e-12, atol=1e-12)


@by_layer
@pytest.mark.parametrize("axes", SHAPES)
def test_backward_is_jax_vjp_whatever_the_leading_axes(x64, name, axes):
    layer, x = LAYERS[name], x_for(name, SHAPES[axes])

    @jax.jit
    def both(params, x):
        y, residuals = layer.forward(params, x)
        dy = jnp.cos(y) + 2
        grads, dx = layer.backward(params, residuals, dy)
        automatic, pulled = jax.vjp(layer.apply, params, x)[1](dy)
        if name == "embedding":
            assert dx is None
            pulled = None
        return (grads, dx), (automatic, pulled)

    params = params_of(layer)
    manual, automatic = both(params, x)
    assert shapes_of(manual[0]) == shapes_of(params)
    assert jax.tree.structure(manual) == jax.tree.structure(automatic)
    for ours, theirs in zip(wide(manual), wide(automatic), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@by_layer
def test_check_layer_passes(x64, name):
    report = fnn.check_layer(LAYERS[name], x_for(name, (2,)), key=jax.random.key(0))
    assert report.passed, report


@pytest.mark.parametrize(
    "name", ["dense", "dense without a bias", "layer_norm", "rms_norm", "embedding"]
)
def test_local_gradients_come_from_residuals_alone(x64, name):
    """The contract of `Layer`.

    Other params in `backward` change what is passed down, never the layer's own gradient.
    """
    layer = LAYERS[name]

    @jax.jit
    def twice(params, other, x):
        y, residuals = layer.forward(params, x)
        both = [layer.backward(p, residuals, jnp.cos(y)) for p in (params, other)]
        return [(grads, () if name == "embedding" else dx) for grads, dx in both]

    (own, dx), (foreign, other_dx) = twice(params_of(layer), params_of(layer, seed=5), x_for(name))
    jax.tree.map(np.testing.assert_array_equal, own, foreign)
    assert name == "embedding" or not np.allclose(dx, other_dx)


@pytest.mark.parametrize(
    "inner",
    [fnn.dense(4, 4), fnn.residual(fnn.dense(4, 4)), fnn.repeat(fnn.dense(4, 4), 1)],
    ids=repr,
)
def test_other_params_in_backward_change_what_a_net_passes_down_and_not_its_last_layer(x64, inner):
    net = fnn.serial(inner, tanh, inner)

    @jax.jit
    def twice(params, other, x):
        y, residuals = net.forward(params, x)
        return [net.backward(p, residuals, jnp.cos(y)) for p in (params, other)]

    (own, dx), (foreign, other_dx) = twice(params_of(net), params_of(net, seed=5), x_for("serial"))
    jax.tree.map(np.testing.assert_array_equal, own[2], foreign[2])
    assert not np.allclose(own[0].w, foreign[0].w)
    assert not np.allclose(dx, other_dx)


@by_layer
def test_the_dtype_is_kept_and_nothing_is_weakly_typed(x64, name):
    layer = LAYERS[name]

    @jax.jit
    def everywhere(params, x):
        found = {}
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            p = cast(params, dtype)
            y, residuals = layer.forward(p, cast(x, dtype))
            grads, dx = layer.backward(p, residuals, y)
            found[dtype] = y, grads, () if name == "embedding" else dx
        return found

    found = everywhere(params_of(layer), x_for(name))
    for dtype, tree in found.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(tree))
        assert error(wide(tree), wide(found["float64"])) <= {"bfloat16": 0.1, "float16": 0.02}.get(
            dtype, 1e-5
        )


# Combinators


def written_out(params, n):
    """What `repeat` stacked, as the tuple that `serial` takes."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(n))


def put_together(reducer, layers):
    """One parameter's results from each layer of a `serial`, as `repeat` gives them."""
    return {
        "total": np.stack,
        "squared_norm": lambda results: np.sum(results, 0),
        "materialise": lambda results: np.stack(results, 1),  # the batch stays in front
    }[reducer.name]([np.asarray(result) for result in layers])


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (1, 4)])
@pytest.mark.parametrize(
    ("inner", "n"),
    [(BLOCK, 3), (BLOCK, 1), (fnn.residual(fnn.serial(fnn.layer_norm(4), fnn.dense(4, 4))), 2)],
)
def test_repeat_is_the_serial_written_out_under_every_reducer(x64, inner, n, shape):
    once, twice = fnn.repeat(inner, n), fnn.repeat(fnn.repeat(inner, n), 2)
    flat = fnn.serial(*[inner] * n)
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape))

    def results(layer, params, x):
        y, residuals = layer.forward(params, x)
        return [(y, *layer.backward(params, residuals, jnp.cos(y), reduce)) for reduce in REDUCERS]

    @jax.jit
    def both(params, deep, x):
        halves = tuple(written_out(half, n) for half in written_out(deep, 2))
        return (
            (results(once, params, x), results(flat, written_out(params, n), x)),
            (results(twice, deep, x), results(fnn.serial(flat, flat), halves, x)),
        )

    shallow, deep = both(params_of(once), params_of(twice), x)
    for (repeated, unrolled), depth in ((shallow, 1), (deep, 2)):
        for reduce, (y, grads, dx), (flat_y, flat_grads, flat_dx) in zip(
            REDUCERS, repeated, unrolled, strict=True
        ):
            np.testing.assert_allclose(y, flat_y, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(dx, flat_dx, rtol=1e-12, atol=1e-12)
            halves = [
                [jax.tree.leaves(layer) for layer in half]
                for half in (flat_grads if depth == 2 else [flat_grads])
            ]
            for i, leaf in enumerate(jax.tree.leaves(grads)):
                expected = [put_together(reduce, [layer[i] for layer in half]) for half in halves]
                expected = put_together(reduce, expected) if depth == 2 else expected[0]
                np.testing.assert_allclose(
                    leaf, expected, rtol=1e-12, atol=1e-12, err_msg=reduce.name, strict=True
                )


ITERATED = {
    "block": (BLOCK, 3),
    "once": (BLOCK, 1),
    "residual, norm, dense": (fnn.residual(fnn.serial(fnn.layer_norm(4), fnn.dense(4, 4))), 2),
    "repeat": (fnn.repeat(BLOCK, 2), 3),
    "repeat of repeat": (fnn.repeat(fnn.repeat(BLOCK, 2), 2), 2),
    "iterate": (fnn.iterate(BLOCK, 2), 2),
}


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (1, 4), (4,)])
@pytest.mark.parametrize("name", ITERATED)
def test_iterate_is_the_serial_of_copies_and_its_gradient_their_sum(x64, name, shape):
    """Every reducer's result is that of the per-example gradients summed over the copies, cross
    terms included."""
    inner, n = ITERATED[name]
    tied, flat = fnn.iterate(inner, n), fnn.serial(*[inner] * n)
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape))

    @jax.jit
    def both(params, x):
        (y, residuals), (flat_y, flat_residuals) = (
            tied.forward(params, x),
            flat.forward((params,) * n, x),
        )
        per_copy, flat_dx = flat.backward(
            (params,) * n, flat_residuals, jnp.cos(flat_y), materialise
        )
        results = [
            tied.backward(params, residuals, jnp.cos(y), reduce) for reduce in (*REDUCERS, keep)
        ]
        results[-1] = materialise.tree(results[-1][0]), results[-1][1]  # what is kept, written out
        return y, results, flat_y, jax.tree.map(lambda *copies: sum(copies), *per_copy), flat_dx

    y, results, flat_y, gradients, flat_dx = both(params_of(inner), x)
    np.testing.assert_allclose(y, flat_y, rtol=1e-12, atol=1e-12)
    for reduce, (grads, dx) in zip((*REDUCERS, materialise), results, strict=True):
        np.testing.assert_allclose(dx, flat_dx, rtol=1e-12, atol=1e-12)
        for ours, g in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(
                ours,
                summed_up(reduce, np.asarray(g)),
                rtol=1e-12,
                atol=1e-12,
                err_msg=reduce.name,
                strict=True,
            )


def summed_up(reducer, g):
    """A reducer's result from the per-example gradients `[batch, ...]`."""
    squares = (g**2).reshape(len(g), -1).sum(1)
    return {
        "total": g.sum(0),
        "materialise": g,
        "squared_norm": squares,
    }[reducer.name]


def test_iterate_keeps_one_sum_for_a_total_and_uses_as_positions_for_factors():
    net, x = fnn.iterate(fnn.dense(4, 4), 3), jnp.ones((5, 2, 4))
    params = net.init(jax.random.key(0))
    _, residuals = net.forward(params, x)
    assert params.w.shape == (4, 4)
    factors = net.backward(params, residuals, x, keep)[0]
    assert factors.w.a.shape == factors.w.dz.shape == (5, 3, 2, 4)
    assert factors.b.gradient.shape == (5, 4)
    outputs = [
        v.aval.shape
        for eqn in jax.make_jaxpr(net.backward)(params, residuals, x).eqns
        for v in eqn.outvars
    ]
    assert (3, 4, 4) not in outputs


@pytest.mark.parametrize("combinator", [fnn.repeat, fnn.iterate])
@pytest.mark.parametrize(
    "inner", [fnn.dense(4, 3), fnn.serial(fnn.dense(4, 8), tanh, fnn.dense(8, 3))], ids=repr
)
def test_what_repeats_must_keep_the_shape(combinator, inner):
    net = combinator(inner, 2)
    with pytest.raises(
        ValueError,
        match=(
            rf"^{combinator.__name__}\({re.escape(inner.name)}, 2\): .* must keep the shape, but "
            r"maps \(6, 4\) .* to \(6, 3\)"
        ),
    ):
        net.apply(net.init(jax.random.key(0)), jnp.ones((6, 4)))


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", None])
def test_iterate_takes_a_whole_number_of_uses(n):
    with pytest.raises((TypeError, ValueError), match="`n` must be a whole number"):
        fnn.iterate(BLOCK, n)
    with pytest.raises(
        TypeError, match=r"`layer` must be a Layer, got 'tanh'. .*fnn.activations.get"
    ):
        fnn.iterate("tanh", 3)


@pytest.mark.parametrize("combinator", [fnn.repeat, fnn.iterate])
@pytest.mark.parametrize("reduce", REDUCERS, ids=lambda r: r.name)
def test_a_hundred_layers_lower_to_the_program_of_twenty(combinator, reduce):
    """Of twenty and not of four, whose uses in `iterate` are few enough for the Gram identity."""

    def size(n):
        net = fnn.serial(
            fnn.dense(4, 8),
            combinator(fnn.residual(fnn.serial(fnn.dense(8, 8), gelu)), n),
            fnn.dense(8, 2),
        )
        params = jax.eval_shape(net.init, jax.random.key(0))
        batch = jax.ShapeDtypeStruct((5, 4), jnp.float32), jax.ShapeDtypeStruct((5, 2), jnp.float32)
        source = fnn.source(net, fnn.losses.l2_loss)
        return len(
            jax.jit(lambda *batch: source(*batch, reduce=reduce)).lower(params, *batch).as_text()
        )

    assert size(100) <= 1.05 * size(20)


def test_residual_adds_its_input(x64):
    x, params = x_for("residual"), params_of(BLOCK)
    np.testing.assert_allclose(
        fnn.residual(BLOCK).apply(params, x), x + BLOCK.apply(params, x), rtol=1e-12
    )


def test_serial_of_nothing_is_the_identity(x64):
    x = x_for("serial")
    y, residuals = fnn.serial().forward((), x)
    np.testing.assert_array_equal(y, x)
    grads, dx = fnn.serial().backward((), residuals, 2 * x)
    assert grads == ()
    np.testing.assert_array_equal(dx, 2 * x)


def test_a_nested_serial_is_the_flat_one(x64):
    a, b, c = fnn.dense(4, 5), tanh, fnn.dense(5, 3)
    p, r = params_of(a), params_of(c)

    def results(layer, params):
        y, residuals = layer.forward(params, x_for("serial"))
        return y, *layer.backward(params, residuals, jnp.sin(y))

    found = jax.jit(
        lambda p, r: [
            results(fnn.serial(a, b, c), (p, (), r)),
            results(fnn.serial(fnn.serial(a, b), c), ((p, ()), r)),
            results(fnn.serial(a, fnn.serial(b, fnn.serial(c))), (p, ((), (r,)))),
        ]
    )(p, r)
    for nested in found[1:]:
        assert error(wide(nested), wide(found[0])) <= 1e-12


# Primitives


def test_dense_is_a_product_and_a_bias(x64):
    x, params = x_for("dense"), params_of(LAYERS["dense"])
    np.testing.assert_allclose(
        LAYERS["dense"].apply(params, x),
        np.asarray(x) @ np.asarray(params.w) + np.asarray(params.b),
        rtol=1e-12,
    )
    assert params_of(LAYERS["dense without a bias"]).b is None
    np.testing.assert_allclose(
        LAYERS["dense without a bias"].apply(Dense(params.w, None), x),
        np.asarray(x) @ np.asarray(params.w),
        rtol=1e-12,
    )


@by_layer
def test_init_depends_on_its_key_alone(name):
    layer = LAYERS[name]
    init = jax.jit(layer.init)
    first, again, other = (
        init(jax.random.key(3)),
        layer.init(jax.random.key(3)),
        init(jax.random.key(4)),
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    weights = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(first)
        if jax.tree_util.keystr(path).endswith(".w")
    ]
    others = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(other)
        if jax.tree_util.keystr(path).endswith(".w")
    ]
    assert not any(np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first))


def test_the_layers_of_a_net_start_from_different_numbers():
    repeated = fnn.repeat(fnn.dense(6, 6), 2).init(jax.random.key(0)).w
    chained = fnn.serial(fnn.dense(6, 6), fnn.dense(6, 6)).init(jax.random.key(0))
    assert not np.allclose(repeated[0], repeated[1])
    assert not np.allclose(chained[0].w, chained[1].w)


def test_dense_starts_at_he_normal_and_a_zero_bias():
    params = fnn.dense(400, 300).init(jax.random.key(0))
    np.testing.assert_allclose(np.std(params.w), np.sqrt(2 / 400), rtol=0.01)
    np.testing.assert_allclose(np.mean(params.w), 0, atol=1e-3)
    np.testing.assert_array_equal(params.b, np.zeros(300))


def test_norms_start_at_scale_one_and_bias_zero():
    for layer, bias in ((fnn.layer_norm(3), True), (fnn.rms_norm(3), False)):
        params = layer.init(jax.random.key(0))
        np.testing.assert_array_equal(params.scale, np.ones(3))
        assert (params.bias is not None) == bias
        assert not bias or not params.bias.any()


@pytest.mark.parametrize(
    ("norm", "width", "number"),
    [("layer_norm", 4, 7.0), ("layer_norm", 1, 3.0), ("rms_norm", 4, 0.0)],
)
def test_norms_of_rows_without_spread_are_finite_with_a_finite_gradient(norm, width, number):
    layer = getattr(fnn, norm)(width)
    x = jnp.full((2, width), number)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = cast(layer.init(jax.random.key(0)), dtype)
        y, residuals = layer.forward(params, x.astype(dtype))
        found = y, *layer.backward(params, residuals, jnp.ones_like(y))
        assert all(np.isfinite(leaf).all() for leaf in wide(found))
        np.testing.assert_array_equal(wide(y)[0], np.zeros((2, width)))


def test_norms_are_their_formulas(x64):
    x, scale, bias = (
        np.random.default_rng(6).normal(size=(3, 2, 4)),
        np.arange(1.0, 5),
        np.arange(4.0),
    )
    centred = x - x.mean(-1, keepdims=True)
    y = fnn.layer_norm(4, epsilon=0.1).apply(
        Norm(jnp.asarray(scale), jnp.asarray(bias)), jnp.asarray(x)
    )
    np.testing.assert_allclose(
        y, centred / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias, rtol=1e-12, atol=1e-14
    )
    y = fnn.rms_norm(4, epsilon=0.1).apply(Norm(jnp.asarray(scale), None), jnp.asarray(x))
    np.testing.assert_allclose(
        y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale, rtol=1e-12
    )


def test_an_index_out_of_range_gives_a_row_of_nan():
    y = fnn.embedding(3, 2).apply(Embedding(jnp.ones((3, 2))), jnp.array([0, 2, 3, 100]))
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, False, True, True])
    np.testing.assert_array_equal(y[:2], np.ones((2, 2)))


def test_the_gradient_of_a_row_looked_up_twice_is_the_sum():
    layer = fnn.embedding(4, 2)
    x, dy = jnp.array([[1, 1], [3, 1]]), jnp.arange(8.0).reshape(2, 2, 2)
    grads, dx = layer.backward(None, x, dy)
    np.testing.assert_array_equal(grads.w, [[0, 0], [0 + 2 + 6, 1 + 3 + 7], [0, 0], [4, 5]])
    assert dx is None


# Nets


def test_mlp_is_blocks_and_a_linear_last_layer(x64):
    net = fnn.mlp((4, 5, 3), "relu")
    params = params_of(net)
    (first, _), last = params
    x = np.asarray(x_for("mlp"))
    hidden = np.maximum(x @ np.asarray(first.w) + np.asarray(first.b), 0)
    np.testing.assert_allclose(
        net.apply(params, jnp.asarray(x)),
        hidden @ np.asarray(last.w) + np.asarray(last.b),
        rtol=1e-12,
    )
    assert net.layers[0].layers[1] is relu
    assert jax.tree.structure(params_of(fnn.mlp((4, 3)))) == jax.tree.structure((Dense(0, 0),))
    assert params_of(fnn.mlp((4, 5, 3), bias_init=None))[1].b is None


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (3, 1, 2), (1, 4)])
def test_the_smallest_nets_have_the_right_gradient(x64, sizes):
    net = fnn.mlp(sizes, "tanh")
    params, x, t = params_of(net), jnp.ones((1, sizes[0])), jnp.zeros((1, sizes[-1]))

    @jax.jit
    def both(params, x, t):
        loss = fnn.losses.l2_loss
        return fnn.value_and_grad(net, loss)(params, x, t), jax.value_and_grad(
            fnn.mean_loss(net, loss)
        )(params, x, t)

    manual, automatic = both(params, x, t)
    assert error(wide(manual), wide(automatic)) <= 1e-12


@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus", "gelu"])
def test_zero_weights_everywhere_have_the_right_finite_gradient(x64, activation):
    inner = fnn.residual(
        fnn.serial(fnn.layer_norm(5), fnn.dense(5, 5), fnn.activations.get(activation))
    )
    net = fnn.serial(
        fnn.mlp((4, 5, 5), activation), fnn.repeat(inner, 2), fnn.rms_norm(5), fnn.dense(5, 3)
    )
    zeros = jax.tree.map(jnp.zeros_like, params_of(net))

    @jax.jit
    def both(params, x):
        loss, t = fnn.losses.softmax_cross_entropy_with_integer_labels, jnp.arange(6) % 3
        return fnn.value_and_grad(net, loss)(params, x, t), jax.value_and_grad(
            fnn.mean_loss(net, loss)
        )(params, x, t)

    manual, automatic = both(zeros, x_for("mlp"))
    assert all(np.isfinite(leaf).all() for leaf in wide(manual))
    np.testing.assert_allclose(manual[0], np.log(3), rtol=1e-12)
    for ours, theirs in zip(wide(manual), wide(automatic), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_summary_counts_every_parameter_once_and_shows_every_layer():
    net = fnn.serial(
        fnn.embedding(7, 4),
        fnn.repeat(fnn.residual(BLOCK), 3),
        fnn.layer_norm(4),
        fnn.dense(4, 2, bias_init=None),
        step,
    )
    lines = [
        line.rsplit(None, 1) for line in fnn.summary(net, (5, 3), dtype=jnp.int32).splitlines()[1:]
    ]
    counts = {line.strip().split("  ")[0]: int(count.replace(",", "")) for line, count in lines}
    assert counts == {
        "serial": 4 * 4 + 4,  # the innermost block; the whole net has the same name
        "embedding(7, 4)": 28,
        "repeat(residual(serial), 3)": 60,
        "3 x residual(serial)": 60,
        "dense(4, 4)": 20,
        "tanh": 0,
        "layer_norm(4)": 8,
        "dense(4, 2)": 8,
        "step": 0,
    }
    assert lines[0][1] == str(28 + 60 + 8 + 8)
    assert all("(5, 3, " in line for line, _ in lines)
    assert lines[0][0].endswith("(5, 3, 2)")
    assert "50,890" in fnn.summary(fnn.mlp((784, 64, 10)), (32, 784))


@pytest.mark.parametrize(
    "net",
    [
        fnn.mlp((4, 5, 3, 2), "identity"),
        fnn.mlp((4, 5, 2), "identity", bias_init=None),
        fnn.serial(
            fnn.dense(4, 4),
            fnn.repeat(fnn.serial(fnn.dense(4, 4), identity), 3),
            fnn.dense(4, 2, bias_init=None),
        ),
        fnn.dense(4, 2),
    ],
    ids=["mlp", "without biases", "repeat", "one layer"],
)
def test_a_linear_net_collapses_to_one_dense_layer(x64, net):
    params, x = params_of(net), x_for("mlp")
    one = fnn.collapse(params)
    assert (one.w.shape, one.b.shape) == ((4, 2), (2,))
    np.testing.assert_allclose(
        fnn.dense(4, 2).apply(one, x), net.apply(params, x), rtol=1e-12, atol=1e-12
    )


def test_a_nested_repeat_of_dense_layers_collapses_in_order(x64):
    net = fnn.repeat(fnn.repeat(fnn.dense(3, 3, bias_init=jax.nn.initializers.normal()), 2), 3)
    params, x = net.init(jax.random.key(0)), jnp.arange(6.0).reshape(2, 3)
    one = fnn.collapse(params)
    np.testing.assert_allclose(fnn.dense(3, 3).apply(one, x), net.apply(params, x), rtol=1e-12)


def test_collapse_refuses_stacked_layers_whose_order_params_do_not_tell(x64):
    block = fnn.serial(fnn.dense(3, 3), fnn.dense(3, 3))
    for net in (
        fnn.repeat(block, 2),
        fnn.serial(fnn.repeat(fnn.dense(3, 3), 2), fnn.repeat(fnn.dense(3, 3), 2)),
    ):
        with pytest.raises(ValueError, match="do not tell their order"):
            fnn.collapse(net.init(jax.random.key(0)))
    apart = fnn.serial(fnn.repeat(fnn.dense(3, 3), 2), fnn.repeat(fnn.dense(3, 3), 4))
    params, x = apart.init(jax.random.key(0)), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(
        fnn.dense(3, 3).apply(fnn.collapse(params), x), apart.apply(params, x), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
def test_a_negative_embedding_index_is_no_row(dtype):
    net = fnn.embedding(200, 2)
    params, x = net.init(jax.random.key(0)), jnp.array([-1, 3], dtype)
    y, residuals = net.forward(params, x)
    assert jnp.isnan(y[0]).all()
    assert (y[1] == params.w[3]).all()
    grads, _ = net.backward(params, residuals, jnp.ones_like(y))
    assert (grads.w[-1] == 0).all()
