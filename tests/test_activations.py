"""Every activation against `jax.nn`.

Values, derivatives (at kinks too), extremes, dtypes, settings and names.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide

import fnn
from fnn import activations
from fnn.nets.activations import ACTIVATIONS, softmax

ELEMENTWISE = tuple(a for a in ACTIVATIONS if a is not softmax)
DTYPES = ("bfloat16", "float16", "float32", "float64")
# every kink of jax.nn's functions (-3, -1, 0, 1, 3, 6) is on it, and its neighbours 1/4 away
GRID = np.linspace(-8, 8, 65)
SETTINGS = (
    ("leaky_relu", {"negative_slope": 0.2}),
    ("leaky_relu", {"negative_slope": -0.5}),
    ("elu", {"alpha": 0.5}),
    ("elu", {"alpha": 2.0}),
    ("celu", {"alpha": 0.5}),
    ("celu", {"alpha": 2.0}),
    ("squareplus", {"b": 0.25}),
    ("gelu", {"approximate": True}),
    ("gelu", {"approximate": False}),
)
# what else is in jax.nn: on whole rows, on several arrays, or, as log1mexp(x > 0), a part of
# formulas
NO_ACTIVATION = {
    "dot_product_attention",
    "get_scaled_dot_general_config",
    "glu",
    "initializers",
    "log1mexp",
    "log_softmax",
    "logmeanexp",
    "logsumexp",
    "one_hot",
    "scaled_dot_general",
    "scaled_matmul",
    "standardize",
}


def reference(activation):
    """JAX's function of that name."""
    if activation.name == "step":  # lecture 000
        return lambda x: jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))
    return getattr(jax.nn, activation.name)


def ours(activation, x, dy):
    """Value and `dx`."""
    y, residuals = activation.forward((), x)
    grads, dx = activation.backward((), residuals, dy)
    assert grads == ()
    return y, dx


def theirs(f, x, dy):
    """Value and `dx` by automatic differentiation."""
    y, pullback = jax.vjp(f, x)
    return y, pullback(dy)[0]


def test_the_grid_holds_every_kink():
    assert set(GRID) >= {-3.0, -1.0, 0.0, 1.0, 3.0, 6.0}


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=repr)
def test_value_and_derivative_are_jax_nns_on_both_sides_of_and_at_every_kink(x64, activation):
    @jax.jit
    def both(x):
        short = x.astype(jnp.float32)
        f = reference(activation)
        return (
            ours(activation, x, jnp.ones_like(x)),
            theirs(f, x, jnp.ones_like(x)),
            ours(activation, short, jnp.ones_like(short)),
            theirs(f, short, jnp.ones_like(short)),
            ours(activation, x, x + 10),  # another cotangent
        )

    manual, automatic, short, short_automatic, with_another = both(jnp.asarray(GRID))
    np.testing.assert_allclose(manual[0], automatic[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(manual[1], automatic[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(with_another[1], automatic[1] * (GRID + 10), rtol=1e-12, atol=1e-11)
    # 1e-6, or where jax.grad is worse, as good as it
    for mine, jaxs, truth in zip(short, short_automatic, automatic, strict=True):
        assert error(wide(mine), wide(truth)) <= max(1e-6, 1.1 * error(wide(jaxs), wide(truth)))


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=repr)
def test_second_derivatives_are_jax_nns_also_at_kinks(x64, activation):
    def slope(x):
        return ours(activation, x, jnp.ones_like(x))[1]

    @jax.jit
    def both(x):
        automatic = jax.grad(reference(activation))
        return jax.vmap(jax.grad(slope))(x), jax.vmap(jax.grad(automatic))(x)

    manual, automatic = map(np.array, both(jnp.asarray(GRID)))
    if activation.name == "celu":  # between 0 and 1 at 0; JAX has 1/4, ours is elu's, which it is
        assert manual[GRID == 0] == 1
        automatic[GRID == 0] = 1
    np.testing.assert_allclose(manual, automatic, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=repr)
def test_derivatives_near_the_largest_number_are_finite(activation):
    x = jnp.array([-3e38, -1e38, 1e38, 3e38])
    _, residuals = activation.forward((), x)
    _, dx = activation.backward((), residuals, jnp.ones_like(x))
    assert jnp.isfinite(dx).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_dtype_is_kept_and_nothing_is_weakly_typed(x64, activation):
    @jax.jit
    def everywhere(x):
        return {dtype: ours(activation, x.astype(dtype), x.astype(dtype)) for dtype in DTYPES}

    for dtype, found in everywhere(jnp.asarray(GRID)).items():
        for got in found:
            assert got.dtype == dtype
            assert not got.weak_type


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_no_derivative_of_a_finite_input_is_nan_on_the_way(activation):
    def slope(x):
        return ours(activation, x, jnp.ones_like(x))[1].sum()

    x = jnp.array([[0.0, 1e-40, 1.0, -1.0, 3.0, -3.0, 17.0, -1e4, 1e30, -1e30]])
    with jax.debug_nans(True):  # not jitted, so that every operation is looked at
        slope(x)
    assert np.isfinite(jax.jit(jax.grad(slope))(x)).all()


def test_half_precision_is_computed_in_float32():
    x = jnp.array([1e4, -300.0], jnp.float16)  # x**2 overflows
    y, dx = ours(activations.squareplus, x, jnp.full_like(x, 1024))
    np.testing.assert_allclose(y, [1e4, 0.00333], rtol=1e-2)
    np.testing.assert_allclose(dx, [1024, 1024 / 300**2], rtol=1e-2)


def test_softmax_is_jax_nns_and_its_backward_the_jacobians_product(x64):
    rng = np.random.default_rng(0)
    x, dy = jnp.asarray(rng.normal(size=(2, 3, 5))), jnp.asarray(rng.normal(size=(2, 3, 5)))

    @jax.jit
    def check(x, dy):
        rows = x.reshape(6, 5)
        jacobians = jax.vmap(jax.jacobian(jax.nn.softmax))(rows)  # [row, y, x]
        product = jnp.einsum("ryx,ry->rx", jacobians, dy.reshape(6, 5)).reshape(x.shape)
        return (
            ours(softmax, x, dy),
            (jax.nn.softmax(x, axis=-1), product),
            ours(softmax, *cast((x, dy), jnp.float32)),
        )

    manual, truth, short = check(x, dy)
    assert error(wide(manual[0]), wide(truth[0])) <= 1e-12
    assert error(wide(manual[1]), wide(truth[1])) <= 1e-12
    assert error(wide(short[1]), wide(truth[1])) <= 1e-6


def test_softmax_of_extreme_and_of_equal_rows_is_finite_in_every_dtype(x64):
    rows = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])

    @jax.jit
    def everywhere(x):
        return {
            dtype: ours(softmax, x.astype(dtype), jnp.asarray([[1.0, 2.0, -1.0]] * 3, dtype))
            for dtype in DTYPES
        }

    for dtype, (y, dx) in everywhere(jnp.asarray(rows)).items():
        assert y.dtype == dx.dtype == dtype
        assert not y.weak_type
        assert not dx.weak_type
        np.testing.assert_allclose(wide(y)[0], [[1, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]], atol=2e-3)
        np.testing.assert_allclose(
            wide(dx)[0], [[0, 0, 0], [1 / 9, 4 / 9, -5 / 9], [-0.25, 0.25, 0]], atol=5e-3
        )


def test_softmax_of_one_output_is_certain_and_has_no_gradient():
    y, dx = ours(softmax, jnp.array([[3.0], [-1e4]]), jnp.ones((2, 1)))
    np.testing.assert_array_equal(y, [[1], [1]])
    np.testing.assert_array_equal(dx, [[0], [0]])


def test_settings_are_those_of_jax_nn(x64):
    @jax.jit
    def both(x):
        return [
            (
                ours(getattr(activations, name)(**setting), x, jnp.ones_like(x)),
                theirs(functools.partial(getattr(jax.nn, name), **setting), x, jnp.ones_like(x)),
            )
            for name, setting in SETTINGS
        ]

    for (name, setting), (manual, automatic) in zip(SETTINGS, both(jnp.asarray(GRID)), strict=True):
        for got, true in zip(manual, automatic, strict=True):
            np.testing.assert_allclose(
                got, true, rtol=1e-12, atol=1e-12, err_msg=f"{name} {setting}"
            )


def test_every_setting_matters_and_its_default_is_jax_nns(x64):
    x = jnp.asarray([-2.0, 0.5])
    for name, setting in SETTINGS:
        default, changed = getattr(activations, name), getattr(activations, name)(**setting)
        same = np.array_equal(default.apply((), x), changed.apply((), x))
        assert same == (setting == {"approximate": True}), (name, setting)


def test_every_elementwise_activation_of_jax_nn_is_here():
    public = {name for name in dir(jax.nn) if not name.startswith("_")}
    assert public > NO_ACTIVATION - {"log1mexp", "logmeanexp"}, (
        "a name that older JAX versions have too"
    )
    known = {activation.name for activation in ACTIVATIONS} | {"swish", "hard_swish"}
    assert public - NO_ACTIVATION <= known, "new in jax.nn: write one `elementwise(...)` line"
    assert known - public == {"step"}


def test_the_names_for_completion_are_those_of_the_activations():
    names = {activation.name for activation in ACTIVATIONS}
    assert set(typing.get_args(activations.Name)) == names | {"swish", "hard_swish"}


def test_names_are_unique_and_get_their_activation():
    assert len({activation.name for activation in ACTIVATIONS}) == len(ACTIVATIONS)
    for activation in ACTIVATIONS:
        assert (
            activations.get(activation.name) is activation is getattr(activations, activation.name)
        )
    assert activations.get("swish") is activations.swish is activations.silu
    assert activations.get("hard_swish") is activations.hard_swish is activations.hard_silu


def test_a_changed_setting_is_in_the_layers_name():
    assert activations.leaky_relu(negative_slope=0.2).name == "leaky_relu(negative_slope=0.2)"
    assert (
        activations.leaky_relu(negative_slope=0.2)(negative_slope=0.3).name
        == "leaky_relu(negative_slope=0.3)"
    )
    assert repr(activations.gelu(approximate=False)) == "gelu(approximate=False)"


def test_a_users_own_activation_with_two_settings_is_a_layer_like_any_other(x64):
    power = fnn.elementwise(
        "power", lambda x, p, c: c * x**p, lambda x, y, p, c: c * p * x ** (p - 1), p=3, c=2.0
    )
    fourth = power(c=0.5)(p=4)
    assert fourth.name == "power(p=4, c=0.5)"
    net = fnn.mlp((3, 4, 2), fourth)
    assert net.layers[0].layers[1] is fourth
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))

    @jax.jit
    def both(x):
        params = net.init(jax.random.key(0))
        value = fnn.mean_loss(net, fnn.losses.l2_loss)
        return (
            ours(fourth, x, x),
            fnn.value_and_grad(net, fnn.losses.l2_loss)(params, x, x[:, :2]),
            jax.grad(value)(params, x, x[:, :2]),
        )

    (y, dx), (_, grads), automatic = both(x)
    np.testing.assert_allclose(y, 0.5 * x**4, rtol=1e-12)
    np.testing.assert_allclose(dx, 2 * x**4, rtol=1e-12)
    assert error(wide(grads), wide(automatic)) <= 1e-12


def test_numpy_arrays_and_any_number_of_axes_are_taken():
    for x in (np.float32(-2.0).reshape(()), np.ones((2, 1, 3), np.float32)):
        y, dx = ours(activations.relu, x, jnp.ones_like(x))
        assert isinstance(y, jax.Array)
        np.testing.assert_array_equal(y, np.maximum(x, 0))
        np.testing.assert_array_equal(dx, x > 0)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_python_float_goes_through_the_manual_derivative(transform):
    tanh = fnn.with_manual_vjp(activations.tanh)
    slope = transform(jax.grad(lambda x: tanh((), x)))
    np.testing.assert_allclose(slope(0.5), 1 - np.tanh(0.5) ** 2, rtol=1e-6)


def test_a_setting_of_numpy_promotes_nothing():
    y, x = (
        fnn.activations.elu(alpha=np.float64(2)).apply((), jnp.ones(2, jnp.bfloat16)),
        jnp.array(np.nan),
    )
    assert y.dtype == jnp.bfloat16
    for bad in (np.nan, "x", x, jnp.ones(2)):
        with pytest.raises(ValueError, match="`alpha` of elu must be a finite number"):
            fnn.activations.elu(alpha=bad)
