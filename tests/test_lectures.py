"""The formulas and figures of the lectures (LECTURES.md), written out literally and held against
`fnn` in float64.

On the lectures' side stand NumPy and Python loops, with samples as columns, W (out, in) and b (n,
1) where the document has them so; `fnn` has samples as rows and `w` [in, out]. Sections in the
order of the sheet. Documents: 000 feed-forward nets, 001 back propagation, 002 lecture 7, 003 deep
learning I, 004 deep nets.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.nn import initializers

import fnn
from experiments._data import load
from experiments.computation_graph import (
    exponential,
    logistic,
    neuron,
    polynomial,
    product_plus_sine,
)
from fnn import losses, training
from fnn.graph import trace
from fnn.nets.activations import identity, leaky_relu, relu, sigmoid, softmax, softplus, step, tanh
from fnn.nets.layers import Dense

pytestmark = pytest.mark.usefixtures("x64")


def same(got, want, tolerance=1e-12):
    """Norm-wise relative agreement; to a zero only zero is the same."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), (got, want)


def value(activation, x):
    return np.asarray(activation.apply((), jnp.asarray(x)))


def slope(activation, x):
    y, residuals = activation.forward((), jnp.asarray(x))
    return np.asarray(activation.backward((), residuals, jnp.ones_like(y))[1])


def rows(W, b):
    """The lectures' W (out, in) and b (n, 1) as `fnn` keeps them."""
    return Dense(w=jnp.asarray(W.T), b=jnp.asarray(b[:, 0]))


def same_layer(got, W, b):
    """Parameters, or gradients, of a dense layer against the lectures' (out, in) and (out, 1)."""
    same(np.asarray(got.w).T, W)
    same(np.asarray(got.b)[:, None], b)


def random_net(rng, *sizes):
    """W^l (n_l, n_{l-1}) and b^l (n_l, 1), counted from 1 as in 004; the entries 0 are empty."""
    pairs = list(itertools.pairwise(sizes))
    return [None] + [rng.normal(size=(n, k)) for k, n in pairs], [None] + [
        rng.normal(size=(n, 1)) for _, n in pairs
    ]


def s(x):
    """The sigmoid as the lectures print it."""
    return 1 / (1 + np.exp(-x))


def descend(net, loss, params, x, y, *, rate, count):
    """`count` full-batch steps of gradient descent in one compiled scan.

    The parameters after them, and the losses before each.
    """
    rule, optimizer = fnn.rules.backprop(net, loss), optax.sgd(rate)
    one_step = training.step(rule, optimizer)
    state = training.init(rule, optimizer, params, fnn.key(0))
    state, values = jax.jit(
        lambda state: lax.scan(lambda state, _: one_step(state, x, y), state, length=count)
    )(state)
    return state.params, values


def gradient(net, loss, params, x, y):
    return jax.jit(fnn.value_and_grad(net, loss))(params, jnp.asarray(x), jnp.asarray(y))


# ---------------------------------------------------------------- Notation


def test_columns_of_the_lectures_are_rows_here():
    """001, 003, 004: Z = W A + b; Delta^l = (W^{l+1})^T Delta^{l+1} (.) s'(Z^l).

    DW = Delta A^T / m, db = mean over columns.
    """
    rng = np.random.default_rng(0)
    m, (_, W1, W2), (_, b1, b2) = 6, *random_net(rng, 3, 4, 2)
    A0, T = rng.normal(size=(3, m)), rng.normal(size=(2, m))
    Z1 = W1 @ A0 + b1
    A1 = s(Z1)
    Z2 = W2 @ A1 + b2
    delta2 = Z2 - T  # l2 loss on a linear output
    delta1 = (W2.T @ delta2) * (A1 * (1 - A1))
    first, second = fnn.dense(3, 4), fnn.dense(4, 2)
    p1, p2 = rows(W1, b1), rows(W2, b2)
    z1, a0 = first.forward(p1, A0.T)
    a1, kept = sigmoid.forward((), z1)
    z2, kept2 = second.forward(p2, a1)
    same(z2, Z2.T)
    dz2 = losses.l2_loss.grad(z2, T.T) / m
    g2, da1 = second.backward(p2, kept2, dz2)
    dz1 = sigmoid.backward((), kept, da1)[1]
    g1, _ = first.backward(p1, a0, dz1)
    same(dz1, delta1.T / m)
    same(g1.w, A0 @ np.asarray(dz1))  # dw = a^T dz, and no 1/m but that in dz
    same(g1.b, np.asarray(dz1).sum(0))
    for g, delta, A in ((g1, delta1, A0), (g2, delta2, A1)):
        same_layer(g, delta @ A.T / m, delta.mean(1, keepdims=True))


def test_weights_and_biases_have_the_shapes_of_the_lecture():
    """004 eqs 11-13: Dim(x) = (n_features, n_items), Dim(W^l) = (n_l, n_{l-1}), Dim(b^l) = (n_l,
    1)."""
    n = (5, 4, 3, 2)
    net = fnn.mlp(n)
    params = jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0))
    for layer in range(1, len(n)):
        p = params[layer - 1] if layer == len(n) - 1 else params[layer - 1][0]
        assert p.w.shape[::-1] == (n[layer], n[layer - 1])
        assert p.b.shape == (n[layer],)
    assert jax.eval_shape(net.apply, params, jax.ShapeDtypeStruct((7, 5), jnp.float64)).shape[
        ::-1
    ] == (2, 7)


@pytest.mark.parametrize(
    ("x", "w1", "w2", "b2", "came", "expected"),
    [
        ((3, 5), (3, 4), (4, 2), (2,), "dense(3, 4): `x` has shape (3, 5)", "[..., 3]"),
        ((5, 3), (4, 3), (4, 2), (2,), "dense(3, 4): `w` has shape (4, 3)", "(3, 4)"),
        ((5, 3), (3, 4), (5, 2), (2,), "dense(4, 2): `w` has shape (5, 2)", "(4, 2)"),
        ((5, 3), (3, 4), (4, 2), (2, 1), "dense(4, 2): `b` has shape (2, 1)", "(2,)"),
    ],
    ids=["x", "W1", "W2", "b2"],
)
def test_a_shape_that_breaks_the_rules_names_the_layer_what_it_expected_and_what_came(
    x, w1, w2, b2, came, expected
):
    """004 eqs 11-13."""
    net = fnn.serial(fnn.dense(3, 4), sigmoid, fnn.dense(4, 2))
    params = Dense(np.zeros(w1), np.zeros(4)), (), Dense(np.zeros(w2), np.zeros(b2))
    with pytest.raises(ValueError, match=f"{re.escape(came)}, expected .*{re.escape(expected)}"):
        jax.eval_shape(
            fnn.value_and_grad(net, losses.l2_loss), params, np.zeros(x), np.zeros((x[0], 2))
        )


# ---------------------------------------------------------------- One neuron, activations


def test_one_neuron_is_a_function_of_weight_times_input_plus_bias():
    """000: out = f(w input + b)."""
    w, b = 1.7, -0.4
    by_hand = {
        "step": lambda z: 1.0 if z >= 0 else -1.0,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
        "relu": lambda z: max(z, 0.0),
    }
    for name, f in by_hand.items():
        neuron = fnn.serial(fnn.dense(1, 1), fnn.activations.get(name))
        for x in (-2.0, 0.1, 3.0):
            same(
                neuron.apply((Dense(np.array([[w]]), np.array([b])), ()), np.array([[x]])),
                [[f(w * x + b)]],
            )


def test_three_inputs_reach_one_neuron_and_four_inputs_three_as_written_out():
    """000: z = sum w_i input_i + b.

    OUT = F(W^T INPUT + B), here W (in, out), as a system of three equations.
    """
    rng = np.random.default_rng(1)
    (w1, w2, w3), b, (i1, i2, i3) = rng.normal(size=3), 0.3, rng.normal(size=3)
    one = fnn.serial(fnn.dense(3, 1), sigmoid)
    same(
        one.apply((Dense(np.array([[w1], [w2], [w3]]), np.array([b])), ()), np.array([i1, i2, i3])),
        [s(w1 * i1 + w2 * i2 + w3 * i3 + b)],
    )
    W, B, (i1, i2, i3, i4) = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=4)
    out1 = s(W[0, 0] * i1 + W[1, 0] * i2 + W[2, 0] * i3 + W[3, 0] * i4 + B[0])
    out2 = s(W[0, 1] * i1 + W[1, 1] * i2 + W[2, 1] * i3 + W[3, 1] * i4 + B[1])
    out3 = s(W[0, 2] * i1 + W[1, 2] * i2 + W[2, 2] * i3 + W[3, 2] * i4 + B[2])
    three = fnn.serial(fnn.dense(4, 3), sigmoid)
    same(three.apply((Dense(W, B), ()), np.array([i1, i2, i3, i4])), [out1, out2, out3])


def test_threshold_is_one_at_zero_and_flat_everywhere():
    """000: f(x) = 1 if x >= 0 else -1; derivative 0."""
    x = np.array([-3.0, -1e-300, 0.0, 1e-300, 3.0])
    assert value(step, x).tolist() == [-1, -1, 1, 1, 1]
    assert slope(step, x).tolist() == [0, 0, 0, 0, 0]


def test_backprop_learns_nothing_through_a_threshold():
    """000: a step of gradient descent leaves the weights below a threshold as they are, and moves
    those above it."""
    net = fnn.serial(fnn.dense(2, 3), step, fnn.dense(3, 1))
    params = net.init(fnn.key(0))
    x, y = jnp.array([[0.5, -1.0], [2.0, 1.0]]), jnp.array([[4.0], [-2.0]])
    with pytest.warns(UserWarning, match="the derivative of `step` is 0 everywhere"):
        after, _ = descend(net, losses.l2_loss, params, x, y, rate=0.1, count=1)
    assert np.array_equal(after[0].w, params[0].w)
    assert np.array_equal(after[0].b, params[0].b)
    assert not np.array_equal(after[2].w, params[2].w)


def test_sigmoid_has_the_figures_of_the_lectures():
    """000-003: s(x) = 1/(1+e^-x).

    S' = s(1-s) = e^-x/(1+e^-x)^2 (003 prints their product, which is not s').
    """
    assert value(sigmoid, [5.0, 10.0]).round(6).tolist() == [0.993307, 0.999955]
    assert [f"{d:.2e}" for d in slope(sigmoid, [5.0, 10.0])] == ["6.65e-03", "4.54e-05"]
    assert slope(sigmoid, [0.0]) == 0.25
    x = np.linspace(-6, 6, 49)
    np.testing.assert_allclose(value(sigmoid, x), s(x), rtol=1e-12)
    np.testing.assert_allclose(slope(sigmoid, x), s(x) * (1 - s(x)), rtol=1e-12)
    np.testing.assert_allclose(slope(sigmoid, x), np.exp(-x) / (1 + np.exp(-x)) ** 2, rtol=1e-12)
    # the product as printed, at 0
    assert s(0) * (1 - s(0)) * np.exp(-0.0) / (1 + np.exp(-0.0)) ** 2 == 0.0625


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_does_not_overflow(dtype):
    """000: at +-1e4."""
    x = np.array([-1e4, 1e4], dtype)
    assert value(sigmoid, x).tolist() == [0, 1]
    assert value(sigmoid, x).dtype == dtype
    assert slope(sigmoid, x).tolist() == [0, 0]


def test_log_odds_and_sigmoid_are_inverse():
    """000, 002: odds = P/(1-P), z = ln odds, P = e^z/(1+e^z)."""
    P = np.linspace(0.01, 0.99, 50)
    z = np.log(P / (1 - P))
    np.testing.assert_allclose(value(sigmoid, z), P, rtol=1e-12)
    np.testing.assert_allclose(value(sigmoid, z), np.exp(z) / (1 + np.exp(z)), rtol=1e-12)


def test_one_neuron_finds_the_coefficients_of_logistic_regression():
    """000, 002: dense + sigmoid + cross-entropy is scikit-learn's LogisticRegression without a
    penalty. Newton on fnn's gradient."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 3))
    y = (rng.random(60) < s(x @ np.array([1.0, -2.0, 0.5]) + 0.3)).astype(np.float64)
    theirs = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(
        x, y
    )
    function = jax.jit(fnn.value_and_grad(fnn.dense(3, 1), losses.sigmoid_binary_cross_entropy))
    v, ones = np.zeros(4), np.c_[x, np.ones(60)]
    for _ in range(12):
        _, g = function(Dense(v[:3, None], v[3:]), x, y[:, None])
        p = s(ones @ v)
        v = v - np.linalg.solve(
            ones.T @ (ones * (p * (1 - p))[:, None]) / 60,
            np.r_[np.asarray(g.w)[:, 0], np.asarray(g.b)],
        )
    assert np.abs(np.asarray(g.w)).max() < 1e-12  # fnn's gradient is zero there
    same(v, np.r_[theirs.coef_[0], theirs.intercept_], 1e-6)


def test_tanh_is_a_stretched_sigmoid():
    """002: tanh x = 2/(1+e^-2x) - 1."""
    x = np.linspace(-8, 8, 65)
    np.testing.assert_allclose(value(tanh, x), 2 / (1 + np.exp(-2 * x)) - 1, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(value(tanh, x), jnp.tanh(x))


def test_relu_is_the_maximum_with_zero_and_flat_at_zero():
    """000, 002: max(x, 0); the derivative at 0 is 0."""
    x = np.array([-2.0, -0.0, 0.0, 1e-300, 2.0])
    assert value(relu, x).tolist() == [max(v, 0) for v in x.tolist()]
    assert slope(relu, x).tolist() == [0, 0, 0, 1, 1]


def test_a_dead_relu_stays_dead():
    """000, 002: all pre-activations below 0 give a zero gradient for ever.

    After 50 steps not a bit has changed.
    """
    net = fnn.mlp((2, 2, 1))
    x, y = jnp.array([[0.5, -1.0], [2.0, 1.0], [1.0, 1.0]]), jnp.array([[4.0], [-2.0], [1.0]])
    params = (
        (Dense(jnp.array([[1.0, 0.5], [-1.0, 1.0]]), jnp.array([-9.0, 1.0])), ()),
        Dense(jnp.array([[1.0], [0.3]]), jnp.array([0.1])),
    )
    after, _ = descend(net, losses.l2_loss, params, x, y, rate=0.05, count=50)
    (before_w, before_b), (w, b) = params[0][0], after[0][0]
    assert np.array_equal(w[:, 0], before_w[:, 0])
    assert b[0] == before_b[0]
    assert after[1].w[0] == params[1].w[0]
    assert not (np.asarray(w[:, 1]) == before_w[:, 1]).any()  # the other unit learns
    assert after[1].w[1] != params[1].w[1]


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.01, 1.0, 2.0])
def test_leaky_relu_has_two_cases_and_is_a_maximum_up_to_slope_one(alpha):
    """003: max(alpha x, x), stated for 0 <= alpha <= 1.

    Above 1 the maximum takes the wrong case on both sides of 0.
    """
    x, layer = np.linspace(-3, 3, 25), leaky_relu(negative_slope=alpha)
    np.testing.assert_allclose(value(layer, x), [v if v >= 0 else alpha * v for v in x], rtol=1e-12)
    np.testing.assert_array_equal(slope(layer, x), [1 if v >= 0 else alpha for v in x])
    assert np.allclose(value(layer, x), np.maximum(alpha * x, x), rtol=1e-12) == (alpha <= 1)


def test_softplus_is_nearly_a_sum_of_shifted_sigmoids():
    """000: ln(1+e^x) is about sum_{i>=1} s(x + 1/2 - i), worst at 0.

    The lecture's sum from i = 0 tends to ln(1+e^{x+1}).
    """
    x = np.linspace(-6, 6, 97)
    from_one = sum(s(x + 0.5 - i) for i in range(1, 60))
    from_zero = sum(s(x + 0.5 - i) for i in range(60))
    np.testing.assert_allclose(value(softplus, x), np.log(1 + np.exp(x)), rtol=1e-12)
    error = np.abs(from_one - value(softplus, x))
    assert round(error.max(), 5) == 0.01058
    assert x[error.argmax()] == 0
    assert round(from_one[48], 6) == 0.682569
    assert value(softplus, x)[48].round(6) == 0.693147
    assert round(np.abs(from_zero - value(softplus, x + 1)).max(), 5) == 0.01058
    assert np.abs(from_zero - value(softplus, x)).max() > 0.6


def test_softmax_is_the_posterior_of_gaussian_classes():
    """000, 002: z_k = ln P(x|C_k)P(C_k); s(z)_j = e^{z_j} / sum_k e^{z_k}, by Bayes P(C_j|x)."""
    rng = np.random.default_rng(3)
    x, mu, prior = rng.normal(size=(5, 2)), rng.normal(size=(3, 2)), np.array([0.2, 0.5, 0.3])
    sigma = np.array([0.5, 1.0, 2.0])
    z, posterior = np.empty((5, 3)), np.empty((5, 3))
    for i in range(5):
        joint = [
            math.exp(-((x[i] - mu[k]) ** 2).sum() / 2 / sigma[k] ** 2)
            / (2 * math.pi * sigma[k] ** 2)
            * prior[k]
            for k in range(3)
        ]
        for k in range(3):
            z[i, k] = math.log(joint[k])
            posterior[i, k] = joint[k] / sum(joint)
    same(value(softmax, z), posterior)
    same(value(softmax, z), np.exp(z) / np.exp(z).sum(1, keepdims=True))
    same(value(softmax, z + 123.0), posterior)  # shift-invariant


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_is_stable(dtype):
    """000: at +-1e4, where e^z overflows."""
    z = np.array([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]], dtype)
    np.testing.assert_allclose(value(softmax, z), [[0.5, 0, 0.5], [1 / 3] * 3], rtol=1e-6)
    dy = jnp.array([[1, 2, 3]] * 2, dtype)
    np.testing.assert_allclose(
        softmax.backward((), jnp.asarray(value(softmax, z)), dy)[1],
        [[-0.5, 0, 0.5], [-1 / 3, 0, 1 / 3]],
        atol=1e-6,
    )


def test_sigmoid_layers_lose_the_gradient_and_relu_layers_keep_it():
    """002, 003: saturation, measured by the gradient's norm in the first layer against the last
    hidden one."""
    x, y = jax.random.normal(fnn.key(0), (64, 16)), jax.random.normal(fnn.key(1), (64, 1))
    shrink = {}
    for name in ("sigmoid", "relu"):
        net = fnn.mlp((16,) * 9 + (1,), name)
        _, g = gradient(net, losses.l2_loss, net.init(fnn.key(2)), x, y)
        norms = [float(np.linalg.norm(block[0].w)) for block in g[:-1]]
        shrink[name] = norms[0] / norms[-1]
    assert shrink["sigmoid"] < 1e-3
    assert shrink["relu"] > 0.1


def test_sigmoid_is_not_zero_centred_and_tanh_is():
    """002, 003: mean activation 1/2 against 0 on inputs symmetric about 0.

    So all of a next unit's weights move in one direction.
    """
    x = np.asarray(jax.random.normal(fnn.key(0), (32, 8)))
    z = np.concatenate([x, -x]) @ np.asarray(jax.random.normal(fnn.key(1), (8, 16)))
    assert abs(value(sigmoid, z).mean() - 0.5) < 1e-12
    assert abs(value(tanh, z).mean()) < 1e-12
    unit = fnn.dense(16, 1)
    signs = {}
    for activation in (sigmoid, tanh):
        a = jnp.asarray(value(activation, z[:1]))
        g, _ = unit.backward(Dense(jnp.ones((16, 1)), jnp.zeros(1)), a, jnp.array([[-0.7]]))
        signs[activation.name] = set(np.sign(g.w).ravel().tolist())
    assert signs == {"sigmoid": {-1.0}, "tanh": {-1.0, 1.0}}


def test_too_long_a_step_kills_relu_units_and_no_leaky_ones():
    """002, 003: the fraction of units whose weights have no gradient on any example."""
    x, y = jax.random.normal(fnn.key(0), (64, 4)), jnp.full((64, 1), -20.0)
    dead = {}
    for activation in (relu, leaky_relu):
        net = fnn.mlp((4, 50, 1), activation)
        start = net.init(fnn.key(1))
        after, _ = descend(net, losses.l2_loss, start, x, y, rate=2.0, count=1)
        function = jax.jit(fnn.value_and_grad(net, losses.l2_loss))
        for when, params in (("before", start), ("after", after)):
            g = function(params, x, y)[1][0][0]
            dead[activation.name, when] = float(
                ((np.asarray(g.w) == 0).all(0) & (np.asarray(g.b) == 0)).mean()
            )
    assert dead["relu", "before"] == 0
    assert dead["relu", "after"] >= 0.1
    assert dead["leaky_relu", "after"] == 0


# ---------------------------------------------------------------- Losses and learning


def test_regression_loss_is_half_the_squared_error_and_gives_the_root_mean_square():
    """000 (prints sqrt(Y^2 - T^2), wrong), 001: 1/2 sum (y-t)^2; RMSE = sqrt mean (y-t)^2."""
    y, t = (
        np.array([[1.0, 3.0], [2.0, -1.0], [0.5, 0.0]]),
        np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0]]),
    )
    per_example = losses.l2_loss.value(y, t)
    assert np.asarray(per_example).tolist() == [2.5, 2.0, 0.125]
    assert np.asarray(losses.l2_loss.grad(y, t)).tolist() == (y - t).tolist()
    same(math.sqrt(2 * np.asarray(per_example).sum() / y.size), math.sqrt(((y - t) ** 2).mean()))
    # where the printed form gives 0
    assert losses.l2_loss.value(np.array([[-3.0]]), np.array([[3.0]])) == 18


def test_cross_entropy_is_entropy_plus_divergence():
    """000: H(p, q) = H(p) + KL(p||q) = -sum p log q.

    1.0771217 for p = (.2, .5, .3), q = (.1, .6, .3).
    """
    p, q = np.array([[0.2, 0.5, 0.3]]), np.array([[0.1, 0.6, 0.3]])
    cross = float(losses.softmax_cross_entropy.value(np.log(q), p)[0])
    entropy = -sum(v * math.log(v) for v in p[0])
    divergence = float(losses.kl_divergence.value(np.log(q), p)[0])
    same(divergence, sum(v * math.log(v / w) for v, w in zip(p[0], q[0], strict=True)))
    same(entropy + divergence, cross)
    same(cross, -sum(v * math.log(w) for v, w in zip(p[0], q[0], strict=True)))
    assert round(cross, 7) == round(entropy + divergence, 7) == 1.0771217


def test_binary_cross_entropy_is_the_printed_sum_on_probabilities_and_on_logits():
    """004 eqs 5 and 24: J = -1/m sum (y log a + (1-y) log(1-a))."""
    rng = np.random.default_rng(4)
    m, z = 9, rng.normal(size=(9, 1)) * 3
    y = (rng.random((m, 1)) < 0.5).astype(np.float64)
    a = s(z)
    J = (
        -1
        / m
        * sum(y[i, 0] * math.log(a[i, 0]) + (1 - y[i, 0]) * math.log(1 - a[i, 0]) for i in range(m))
    )
    same(losses.binary_cross_entropy.value(a, y).mean(), J)
    same(losses.sigmoid_binary_cross_entropy.value(z, y).mean(), J)
    far = losses.sigmoid_binary_cross_entropy.value(
        np.array([[1e4], [-1e4]]), np.array([[0.0], [1.0]])
    )
    assert np.asarray(far).tolist() == [1e4, 1e4]


def test_maximum_likelihood_is_the_sample_frequency():
    """002: the mean cross-entropy is -log likelihood / m, and its gradient vanishes where the
    probabilities are the frequencies."""
    coin = np.array([1, 1, 1, 0, 1, 0, 0, 1, 1, 1.0])[:, None]
    die = np.array([0, 2, 2, 1, 2, 0, 2, 2, 2, 1])
    f, frequencies = coin.mean(), np.array([(die == k).mean() for k in range(3)])
    x = np.zeros((10, 1))  # nothing but the bias counts
    cases = [
        (
            losses.binary_cross_entropy,
            coin,
            np.array([f]),
            np.log(f ** coin.sum() * (1 - f) ** (1 - coin).sum()),
        ),
        (
            losses.sigmoid_binary_cross_entropy,
            coin,
            np.array([np.log(f / (1 - f))]),
            np.log(f ** coin.sum() * (1 - f) ** (1 - coin).sum()),
        ),
        (
            losses.softmax_cross_entropy,
            np.eye(3)[die],
            np.log(frequencies),
            np.log(np.prod(frequencies[die])),
        ),
        (
            losses.softmax_cross_entropy_with_integer_labels,
            die,
            np.log(frequencies),
            np.log(np.prod(frequencies[die])),
        ),
    ]
    for loss, y, best, log_likelihood in cases:
        n = len(best)
        function = jax.jit(fnn.value_and_grad(fnn.dense(1, n), loss))
        least, g = function(Dense(np.zeros((1, n)), best), x, y)
        same(least, -log_likelihood / 10)
        assert np.abs(np.asarray(g.b)).max() < 1e-14
        off = best + 0.05 * np.arange(1, n + 1)
        other, g = function(Dense(np.zeros((1, n)), off), x, y)
        assert other > least
        assert np.abs(np.asarray(g.b)).max() > 1e-3


def test_empirical_risk_is_the_mean_loss():
    """003: Q(w) = 1/l sum_i L(f(x_i, w), y_i).

    With weights, the same of every example counted so often.
    """
    rng = np.random.default_rng(5)
    (_, W), (_, b) = random_net(rng, 3, 2)
    x, y, often = rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), [2, 1, 0, 3, 1]

    def L(i):
        return sum(0.5 * (W[j] @ x[i] + b[j, 0] - y[i, j]) ** 2 for j in range(2))

    net, params = fnn.dense(3, 2), rows(W, b)
    risk = jax.jit(fnn.mean_loss(net, losses.l2_loss))
    same(risk(params, x, y), sum(L(i) for i in range(5)) / 5)
    same(
        risk(params, x, y, np.array(often, np.float64)), sum(often[i] * L(i) for i in range(5)) / 7
    )
    function = fnn.value_and_grad(net, losses.l2_loss)
    plain, weighted = jax.jit(lambda p, *d: (function(p, *d[:2]), function(p, *d)))(
        params, x, y, np.array(often, np.float64)
    )
    same(plain[0], sum(L(i) for i in range(5)) / 5)
    same(weighted[0], sum(often[i] * L(i) for i in range(5)) / 7)
    index = np.repeat(np.arange(5), often)
    same(weighted[1].w, gradient(net, losses.l2_loss, params, x[index], y[index])[1].w)


def test_gradient_descent_on_a_quadratic_has_its_closed_form():
    """000, 002: x1 = x0 - eta df/dx.

    The error shrinks by 1 - eta curvature each step, and grows for eta > 2/curvature.
    """
    net = fnn.dense(1, 1, bias_init=None)
    x, w0, best, k = jnp.array([[1.0], [-2.0], [0.5]]), 3.0, 1.25, 12
    curvature = float((x**2).mean())  # of 1/2 mean (w x - best x)^2
    rates = np.array([0.1, 0.5, 1.9, 2.1]) / curvature
    run = jax.vmap(
        lambda rate: descend(
            net, losses.l2_loss, Dense(jnp.array([[w0]]), None), x, best * x, rate=rate, count=k
        )[0].w[0, 0]
    )
    errors = np.asarray(run(jnp.asarray(rates))) - best
    np.testing.assert_allclose(errors, (w0 - best) * (1 - rates * curvature) ** k, rtol=1e-10)
    assert (np.abs(errors[:3]) < w0 - best).all()
    assert abs(errors[3]) > w0 - best


def test_mean_of_per_example_gradients_is_the_batch_gradient():
    """002 (SGD)."""
    rng = np.random.default_rng(6)
    net, (_, W1, W2), (_, b1, b2) = fnn.mlp((3, 4, 2), "tanh"), *random_net(rng, 3, 4, 2)
    params = ((rows(W1, b1), ()), rows(W2, b2))
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    function = fnn.value_and_grad(net, losses.l2_loss)
    single = jax.jit(function)
    _, whole = single(params, x, y)
    each = [single(params, x[i : i + 1], y[i : i + 1])[1] for i in range(5)]
    from_factors = jax.jit(fnn.per_example.gradients(fnn.source(net, losses.l2_loss)))(params, x, y)
    by_vmap = jax.jit(fnn.per_example.by_vmap(function))(params, x, y)[1]
    for g, stacked, mapped, *one in zip(
        *map(jax.tree.leaves, (whole, from_factors, by_vmap, *each)), strict=True
    ):
        same(sum(np.asarray(e) for e in one) / 5, g)
        same(stacked, np.stack(one))
        same(mapped, np.stack(one))
        same(stacked.mean(0), g)


def test_float32_numbers_take_four_bytes_each():
    """002: why a batch at a time."""
    with jax.enable_x64(False):
        net = fnn.mlp((64, 32, 10))
        leaves = jax.tree.leaves(net.init(fnn.key(0)))
        n = 64 * 32 + 32 + 32 * 10 + 10
        assert sum(leaf.nbytes for leaf in leaves) == 4 * n
        assert f"{n:,}" in fnn.summary(net, (1, 64))


# ---------------------------------------------------------------- Backprop, by hand


def test_scalar_chain():
    """001: p = Vx + v, y = s(p), q = Uy + u, z = s(q), e = 1/2 (z-l)^2, and its derivatives one
    after the other."""
    V, v, U, u, x, target = 0.7, -0.2, 1.3, 0.4, 0.9, 0.25
    p = V * x + v
    y = s(p)
    q = U * y + u
    z = s(q)
    de_dz = z - target
    de_dq = de_du = de_dz * z * (1 - z)
    de_dU = de_dq * y
    de_dy = de_dq * U
    de_dp = de_dv = de_dy * y * (1 - y)
    de_dV = de_dp * x
    net = fnn.serial(fnn.dense(1, 1), sigmoid, fnn.dense(1, 1), sigmoid)
    params = Dense(np.array([[V]]), np.array([v])), (), Dense(np.array([[U]]), np.array([u])), ()
    error, g = gradient(net, losses.l2_loss, params, [[x]], [[target]])
    same(error, 0.5 * (z - target) ** 2)
    same([g[0].w[0, 0], g[0].b[0], g[2].w[0, 0], g[2].b[0]], [de_dV, de_dv, de_dU, de_du])


def test_vector_chain_has_an_outer_and_a_hadamard_product():
    """001: de/dV = de/dp (x) x, de/dp = de/dy (.) s'(p), de/dy = U^T de/dq, for one example."""
    rng = np.random.default_rng(7)
    (_, V, U), (_, v, u) = random_net(rng, 3, 4, 2)
    x, target = rng.normal(size=(3, 1)), rng.normal(size=(2, 1))
    p = V @ x + v
    y = s(p)
    z = s(U @ y + u)
    de_dq = (z - target) * z * (1 - z)
    de_dy = U.T @ de_dq
    de_dp = de_dy * (y * (1 - y))
    net = fnn.serial(fnn.dense(3, 4), sigmoid, fnn.dense(4, 2), sigmoid)
    _, g = gradient(net, losses.l2_loss, (rows(V, v), (), rows(U, u), ()), x.T, target.T)
    same_layer(g[0], np.outer(de_dp, x), de_dp)
    same_layer(g[2], np.outer(de_dq, y), de_dq)
    # the two vectors, not multiplied
    _, kept = fnn.source(net, losses.l2_loss)((rows(V, v), (), rows(U, u), ()), x.T, target.T)
    same(kept[0].w.a, x.T)
    same(kept[0].w.dz, de_dp.T)


def forward_by_index(n, w, b, x):
    """The outputs of every unit of every layer, `a[l, unit, example]`."""
    a = np.zeros((len(n), max(n), len(x)))
    a[0, : n[0]] = x.T
    for layer in range(1, len(n)):
        for j in range(n[layer]):
            for k in range(len(x)):
                a[layer, j, k] = s(
                    sum(w[layer][i, j] * a[layer - 1, i, k] for i in range(n[layer - 1]))
                    + b[layer][j]
                )
    return a


def hidden_by_index(n, w, a, d, dw):
    """Fills `d` and `dw` of the hidden layers from those of the layers above."""
    for layer in range(len(n) - 2, 0, -1):
        for j in range(n[layer]):
            for e in range(a.shape[2]):
                above = sum(d[layer + 1, k, e] * w[layer + 1][j, k] for k in range(n[layer + 1]))
                d[layer, j, e] = a[layer, j, e] * (1 - a[layer, j, e]) * above
                for i in range(n[layer - 1]):
                    dw[layer][i, j] += (
                        a[layer - 1, i, e] * a[layer, j, e] * (1 - a[layer, j, e]) * above
                    )


def last_by_index(n, a, t, d, dw):
    """Fills `d` and `dw` of the last layer."""
    L, m = len(n) - 1, len(t)
    for i in range(n[L - 1]):
        for j in range(n[L]):
            dw[L][i, j] = sum(
                (a[L, j, k] - t[k, j]) * a[L, j, k] * (1 - a[L, j, k]) * a[L - 1, i, k]
                for k in range(m)
            )
    for j in range(n[L]):
        for k in range(m):
            d[L, j, k] = (a[L, j, k] - t[k, j]) * a[L, j, k] * (1 - a[L, j, k])


def test_index_forms_of_the_last_and_the_hidden_layers():
    """000, sums mended: dE/dw_ij^L = sum_k (a_jk - t_jk) a_jk (1 - a_jk) a_ik^{L-1}, k over
    examples; below,
    dE/dw_ij^l = sum over examples of a_i^{l-1} a_j^l (1 - a_j^l) sum_k d_k^{l+1} w_jk^{l+1}. E is a
    sum: m times fnn's mean."""
    rng = np.random.default_rng(8)
    n, m, L = (3, 4, 3, 2), 5, 3
    w, b = (
        [None] + [rng.normal(size=(n[layer - 1], n[layer])) for layer in (1, 2, 3)],
        [None] + [rng.normal(size=k) for k in n[1:]],
    )
    x, t = rng.normal(size=(m, 3)), rng.normal(size=(m, 2))
    a = forward_by_index(n, w, b, x)
    d = np.zeros_like(a)
    dw = [None] + [np.zeros((n[layer - 1], n[layer])) for layer in range(1, L + 1)]
    last_by_index(n, a, t, d, dw)
    hidden_by_index(n, w, a, d, dw)
    net = fnn.serial(
        *(
            part
            for layer in range(1, L + 1)
            for part in (fnn.dense(n[layer - 1], n[layer]), sigmoid)
        )
    )
    params = tuple(part for layer in range(1, L + 1) for part in (Dense(w[layer], b[layer]), ()))
    E, g = gradient(net, losses.l2_loss, params, x, t)
    same(m * E, sum(0.5 * (a[L, j, k] - t[k, j]) ** 2 for j in range(2) for k in range(m)))
    for layer in range(1, L + 1):
        same(m * g[2 * layer - 2].w, dw[layer])
        same(m * g[2 * layer - 2].b, d[layer, : n[layer]].sum(1))


def test_shallow_net_with_samples_as_columns():
    """004 eqs 1-10: dz2 = a2 - y; dw2 = 1/m dz2 a1^T; db = mean dz.

    Dz1 = w2^T dz2 * s'(z1). dz is m times dJ/dz.
    """
    rng = np.random.default_rng(9)
    m, (_, w1, w2), (_, b1, b2) = 8, *random_net(rng, 2, 4, 1)
    x, y = rng.normal(size=(2, m)), (rng.random((1, m)) < 0.5).astype(np.float64)
    z1 = w1 @ x + b1
    a1 = s(z1)
    z2 = w2 @ a1 + b2
    a2 = s(z2)
    J = -1 / m * (y * np.log(a2) + (1 - y) * np.log(1 - a2)).sum()
    dz2 = a2 - y
    dw2, db2 = 1 / m * dz2 @ a1.T, dz2.mean(1, keepdims=True)
    dz1 = w2.T @ dz2 * (a1 * (1 - a1))
    dw1, db1 = 1 / m * dz1 @ x.T, dz1.mean(1, keepdims=True)
    hidden, last = fnn.serial(fnn.dense(2, 4), sigmoid), fnn.dense(4, 1)
    on_probabilities = (
        fnn.serial(hidden, last, sigmoid),
        losses.binary_cross_entropy,
        ((rows(w1, b1), ()), rows(w2, b2), ()),
    )
    on_logits = (
        fnn.mlp((2, 4, 1), "sigmoid"),
        losses.sigmoid_binary_cross_entropy,
        ((rows(w1, b1), ()), rows(w2, b2)),
    )
    for net, loss, params in (on_probabilities, on_logits):
        error, g = gradient(net, loss, params, x.T, y.T)
        same(error, J)
        for got, dw, db in ((g[0][0], dw1, db1), (g[1], dw2, db2)):
            same_layer(got, dw, db)
        # without the 1/m, as the lecture's dz
        _, kept = jax.jit(fnn.source(net, loss))(params, x.T, y.T)
        same(kept[1].w.dz.T, dz2)
        same(kept[0][0].w.dz.T, dz1)


def deep_net(W, b, X, Y):
    """004 eqs 21-28, samples as columns: Z^l = W^l A^{l-1} + b^l, ReLU for l < L, sigmoid at L.

    J, dW, db, dz.
    """
    L, m = len(W) - 1, X.shape[1]
    Z, A = [None] * (L + 1), [X] + [None] * L
    for layer in range(1, L + 1):
        Z[layer] = W[layer] @ A[layer - 1] + b[layer]
        A[layer] = np.maximum(Z[layer], 0) if layer < L else s(Z[layer])
    J = -1 / m * (Y * np.log(A[L]) + (1 - Y) * np.log(1 - A[L])).sum()
    dW, db, dz = [None] * (L + 1), [None] * (L + 1), [None] * L + [A[L] - Y]
    for layer in range(L, 0, -1):
        dW[layer] = 1 / m * dz[layer] @ A[layer - 1].T
        db[layer] = dz[layer].mean(1, keepdims=True)
        if layer > 1:
            da = W[layer].T @ dz[layer]
            dz[layer - 1] = da * (Z[layer - 1] > 0)
    return J, dW, db, dz


def deep_data(rng, *n, m):
    W, b = random_net(rng, *n)
    params = *((rows(W[layer], b[layer]), ()) for layer in range(1, len(n) - 1)), rows(W[-1], b[-1])
    return W, b, params, rng.normal(size=(n[0], m)), (rng.random((1, m)) < 0.5).astype(np.float64)


def test_deep_net_with_samples_as_columns():
    """004 eqs 21-28: dW^l = 1/m dz^l a^{l-1}^T; db^l = mean dz^l; da^{l-1} = w^l^T dz^l.

    Dz^l = da^l * s'(z^l); dz^L = a^L - y.
    """
    W, b, params, X, Y = deep_data(np.random.default_rng(10), 3, 5, 4, 4, 1, m=9)
    J, dW, db, dz = deep_net(W, b, X, Y)
    on_logits = fnn.mlp((3, 5, 4, 4, 1)), losses.sigmoid_binary_cross_entropy, params
    on_probabilities = (
        fnn.serial(*on_logits[0].layers, sigmoid),
        losses.binary_cross_entropy,
        (*params, ()),
    )
    for net, loss, p in (on_logits, on_probabilities):
        error, g = gradient(net, loss, p, X.T, Y.T)
        _, kept = jax.jit(fnn.source(net, loss))(p, X.T, Y.T)
        same(error, J)
        for layer in range(1, 5):
            got, factor = (g[layer - 1][0], kept[layer - 1][0]) if layer < 4 else (g[3], kept[3])
            same_layer(got, dW[layer], db[layer])
            same(factor.w.dz.T, dz[layer])


# ---------------------------------------------------------------- Derivatives of any function


def test_the_logistic_neuron_of_one_and_of_two_inputs():
    """002: 1/(1+e^-(w0+w1 x)) at w0 = 1, w1 = -2, x = .5 and at z = -1.

    The sigmoid circuit w = (2, -3, -3), x = (-1, -2).
    """
    at_zero = trace(logistic, 0.5, 1.0, -2.0)
    assert float(at_zero.value) == 0.5
    # by x, w0, w1: s'(0) = 1/4 times w1, 1, x
    assert [float(d) for d in at_zero.gradients()] == [-0.5, 0.25, 0.125]
    below = trace(logistic, 2.0, 1.0, -1.0)
    np.testing.assert_allclose(below.value, 0.268941, atol=5e-7)
    np.testing.assert_allclose(below.gradients(), (-0.196612, 0.196612, 0.393224), atol=5e-7)
    circuit = trace(neuron, 2.0, -3.0, -3.0, -1.0, -2.0)
    np.testing.assert_allclose(circuit.value, 0.731059, atol=5e-7)
    np.testing.assert_allclose(
        circuit.gradients(), (-0.1966, -0.3932, 0.1966, 0.3932, -0.5898), atol=5e-5
    )


# a graph of the lectures; the point a; by hand: df/dt at t = 1 along the path x_i = a_i t^i, i = 1,
# 2, ...
GRAPHS = {
    "000": (product_plus_sine, (2.0, 5.0), 30 + 2 * math.cos(2)),  # 10 t^3 + sin 2t
    "003": (polynomial, (1.0, 2.0, 3.0), 42 - 8),  # 6 t^7 - 2 t^4
    "002, exponential": (exponential, (0.5, 1.0, -2.0), 2 - 4),  # 1 + e^(t^2 - t^4)
    "002, one input": (logistic, (0.5, 1.0, -2.0), (2 - 4) / 4),  # s(t^2 - t^4)
    # s(-2 t^5 + 6 t^7 - 3 t^3)
    "002, two inputs": (neuron, (2.0, -3.0, -3.0, -1.0, -2.0), (-10 + 42 - 9) * s(1) * (1 - s(1))),
}


@pytest.mark.parametrize(("f", "a", "by_hand"), GRAPHS.values(), ids=GRAPHS)
def test_chain_rule_and_total_derivative_on_the_graphs_of_the_lectures(f, a, by_hand):
    """002, 003: df(g(x))/dx = f'(g(x)) g'(x), for one input that moves.

    Sum D_i f dg_i/dx, for all of them.
    """
    path = [lambda t, a=a, i=i: a * t**i for i, a in enumerate(a, start=1)]
    inner = [float(trace(g, 1.0).gradients()[0]) for g in path]
    assert inner == [i * a for i, a in enumerate(a, start=1)]
    outer = trace(f, *a)
    for i, (partial, slope) in enumerate(zip(outer.gradients(), inner, strict=True)):
        moved = trace(
            lambda t, i=i: f(*(g(t) if j == i else a[j] for j, g in enumerate(path))), 1.0
        )
        same(moved.gradients()[0], partial * slope)
    total = sum(
        float(partial) * slope for partial, slope in zip(outer.gradients(), inner, strict=True)
    )
    same(total, by_hand)
    same(outer.jvp(*inner), by_hand)
    same(trace(lambda t: f(*(g(t) for g in path)), 1.0).gradients()[0], by_hand)


def figures(f, *at):
    return [float(d) for d in trace(f, *at).gradients()]


@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_a_gate_multiplies_the_gradient_from_above_by_its_local_derivative(upstream):
    """002, general gate."""
    for gate, x, local in (
        (jnp.exp, 0.0, 1),
        (jnp.square, 3.0, 6),
        (jnp.sqrt, 4.0, 0.25),
        (jnp.log, 2.0, 0.5),
        (jnp.negative, 5.0, -1),
    ):
        same(figures(lambda x, gate=gate: upstream * gate(x), x), [upstream * local])


def test_add_distributes():
    assert figures(lambda a, b: a + b, 2.0, -1.0) == [1, 1]
    assert figures(lambda a, b: 2 * (a + b), 2.0, -1.0) == [2, 2]


def test_copy_adds():
    assert figures(lambda a: 2 * a + 5 * a, 3.0) == [7]
    assert figures(lambda a: a * a, 3.0) == [6]


def test_mul_swaps_the_multipliers():
    assert figures(lambda a, b: a * b, 3.0, -4.0) == [-4, 3]
    assert figures(lambda a, b: 2 * (a * b), 3.0, -4.0) == [-8, 6]


def test_max_routes_and_a_tie_shares_equally():
    assert figures(lambda a, b: 2 * jnp.maximum(a, b), 2.0, -1.0) == [2, 0]
    assert figures(lambda a, b: 2 * jnp.maximum(a, b), -1.0, 2.0) == [0, 2]
    assert figures(jnp.maximum, 2.0, 2.0) == [0.5, 0.5]
    assert figures(jnp.minimum, 2.0, 2.0) == [0.5, 0.5]


# ---------------------------------------------------------------- Networks


@pytest.mark.parametrize("n", [(3, 4, 2), (3, 5, 4, 2)], ids=["shallow", "deep"])
def test_a_net_is_dense_layers_one_after_the_other(n):
    """003: z_i = s(W_i z_{i-1} + b_i), the latent representations.

    004: shallow has one hidden layer, deep two or more.
    """
    rng = np.random.default_rng(11)
    W, b = random_net(rng, *n)
    hidden = len(n) - 2
    net = fnn.mlp(n, "tanh")
    params = *((rows(W[i], b[i]), ()) for i in range(1, hidden + 1)), rows(W[-1], b[-1])
    z = x = rng.normal(size=(3, 6))
    latent = jnp.asarray(x.T)
    assert len(net.layers) - 1 == hidden
    for i in range(1, hidden + 1):
        z = np.tanh(W[i] @ z + b[i])
        latent = net.layers[i - 1].apply(params[i - 1], latent)
        same(latent, z.T)
    same(net.apply(params, x.T), (W[-1] @ z + b[-1]).T)


def test_a_net_without_activations_is_one_matrix():
    """002, 003: W_n ... W_1 x + b; with an activation it is not.

    So an activation must be non-linear.
    """
    rng = np.random.default_rng(12)
    W, b = random_net(rng, 3, 5, 4, 2)
    params = (rows(W[1], b[1]), ()), (rows(W[2], b[2]), ()), rows(W[3], b[3])
    x = rng.normal(size=(3, 6))
    one = fnn.collapse(params)
    same_layer(one, W[3] @ W[2] @ W[1], W[3] @ (W[2] @ b[1] + b[2]) + b[3])
    collapsed = np.asarray(fnn.dense(3, 2).apply(one, x.T))
    same(collapsed, fnn.mlp((3, 5, 4, 2), identity).apply(params, x.T))
    bent = np.asarray(fnn.mlp((3, 5, 4, 2), tanh).apply(params, x.T))
    assert np.linalg.norm(bent - collapsed) > 0.1 * np.linalg.norm(collapsed)


@pytest.mark.parametrize("depth", [1, 4, 10])
def test_sigmoid_layers_multiply_the_gradient_by_at_most_a_quarter_each(depth):
    """003: s' <= 1/4, so the product is at most .25^L: reached where every z is 0.

    Not passed where weights only rotate.
    """
    chain = fnn.serial(*(fnn.dense(1, 1), sigmoid) * depth)
    at_zero = (Dense(jnp.array([[1.0]]), jnp.array([-0.5])), ()) * depth
    _, kept = chain.forward(at_zero, jnp.array([[0.5]]))
    assert chain.backward(at_zero, kept, jnp.array([[1.0]]))[1] == 0.25**depth

    def shrink(activation):
        net = fnn.serial(
            *(fnn.dense(8, 8, kernel_init=initializers.orthogonal()), activation) * depth
        )
        params = net.init(fnn.key(0))

        def ratio(x, dy):
            dx = net.backward(params, net.forward(params, x)[1], dy)[1]
            return jnp.linalg.norm(dx, axis=1) / jnp.linalg.norm(dy, axis=1)

        return np.asarray(
            jax.jit(ratio)(
                jax.random.normal(fnn.key(1), (20, 8)), jax.random.normal(fnn.key(2), (20, 8))
            )
        )

    assert (shrink(sigmoid) <= 0.25**depth).all()
    np.testing.assert_allclose(shrink(identity), 1, rtol=1e-12)


def _unequal_data():
    x = jax.random.normal(fnn.key(0), (40, 2))
    return x, (x[:, :1] - 0.5 * x[:, 1:] > 0.6).astype(jnp.float64)


def test_hidden_sigmoid_units_that_start_at_zero_stay_identical():
    """004 eqs 14-20: after 2000 steps the spread between the units of a layer is exactly 0.

    Each layer has learnt all the same.
    """
    x, y = _unequal_data()
    net = fnn.mlp((2, 4, 4, 1), "sigmoid", kernel_init=initializers.zeros)
    ((first, _), (second, _), last), values = descend(
        net, losses.sigmoid_binary_cross_entropy, net.init(fnn.key(1)), x, y, rate=1.0, count=2000
    )
    for leaf, axes in (
        (first.w, (1,)),
        (first.b, (0,)),
        (second.w, (0, 1)),
        (second.b, (0,)),
        (last.w, (0,)),
    ):
        assert (np.ptp(np.asarray(leaf), axis=axes) == 0).all()
        assert np.abs(np.asarray(leaf)).max() > 1e-6
    assert values[-1] < values[0]


def test_of_a_relu_net_that_starts_at_zero_only_the_last_bias_moves():
    """004 eqs 14-20: to logit(mean y)."""
    x, y = _unequal_data()
    net = fnn.mlp((2, 4, 4, 1), "relu", kernel_init=initializers.zeros)
    ((first, _), (second, _), last), _ = descend(
        net, losses.sigmoid_binary_cross_entropy, net.init(fnn.key(1)), x, y, rate=1.0, count=2000
    )
    assert not any(np.asarray(leaf).any() for leaf in (*first, *second, last.w))
    frequency = float(y.mean())
    assert 0.1 < frequency < 0.4
    same(last.b, [math.log(frequency / (1 - frequency))])


def test_a_wide_net_saturates_unless_its_weights_are_scaled_by_the_fan_in():
    """004: N(0, 1) against N(0, 1/fan_in), 400 inputs: the fraction of tanh units beyond .99."""
    x = jax.random.normal(fnn.key(0), (32, 400))
    saturated = {}
    for name, deviation in (("unit", 1.0), ("fan_in", 400**-0.5)):
        layer = fnn.serial(fnn.dense(400, 400, kernel_init=initializers.normal(deviation)), tanh)
        saturated[name] = float((np.abs(layer.apply(layer.init(fnn.key(1)), x)) > 0.99).mean())
    assert saturated["unit"] > 0.85
    assert saturated["fan_in"] < 0.02


def test_four_hidden_units_classify_the_flower_and_logistic_regression_does_not():
    """004: about 90 % against about 50 % of 400 points."""
    data = load("flower", seed=0)
    x = jnp.asarray(np.concatenate([data.x_train, data.x_test]), jnp.float64)
    y = jnp.asarray(np.concatenate([data.t_train, data.t_test])[:, None], jnp.float64)
    assert x.shape == (400, 2)
    accuracy = {}
    for name, net, count in (
        ("hidden", fnn.mlp((2, 4, 1), "tanh"), 4000),
        ("logistic", fnn.dense(2, 1), 500),
    ):
        loss = losses.sigmoid_binary_cross_entropy
        params, _ = descend(net, loss, net.init(fnn.key(0)), x, y, rate=1.2, count=count)
        accuracy[name] = fnn.evaluate(fnn.rules.backprop(net, loss), params, (x, y))["accuracy"]
    assert accuracy["hidden"] >= 0.85
    assert accuracy["logistic"] <= 0.65


def test_training_loop_of_the_lecture_is_fit():
    """004: initialise, then loop: forward, backward, update, written out with columns."""
    W, b, params, X, Y = deep_data(np.random.default_rng(13), 3, 5, 4, 1, m=12)
    rate, J = 0.1, []
    for _ in range(20):
        error, dW, db, _ = deep_net(W, b, X, Y)
        J.append(error)  # before the update, as fit's history
        for layer in range(1, 4):
            W[layer] = W[layer] - rate * dW[layer]
            b[layer] = b[layer] - rate * db[layer]
    rule = fnn.rules.backprop(fnn.mlp((3, 5, 4, 1)), losses.sigmoid_binary_cross_entropy)
    fitted, history = fnn.fit(
        rule, optax.sgd(rate), params, (X.T, Y.T), epochs=20, batch_size=12, key=fnn.key(0)
    )
    same(history.loss, J)
    for layer in range(1, 4):
        got = fitted[layer - 1][0] if layer < 3 else fitted[2]
        same_layer(got, W[layer], b[layer])
