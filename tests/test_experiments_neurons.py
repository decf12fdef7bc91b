"""What the experiments on neurons, activations and gradient descent claim, and the figures of the
lectures in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from experiments import (
    activations,
    dead_relu,
    gradient_descent,
    logistic_regression,
    softmax_from_bayes,
)
from fnn.nets.activations import ACTIVATIONS

# ---------------------------------------------------------------- activations


@pytest.fixture(scope="module")
def curves():
    return activations.run(activations.Config(points=1601))


def test_saturated_shares_are_those_of_the_formulas(curves):
    assert set(curves.curves) == {activation.name for activation in ACTIVATIONS}
    edge = {
        "sigmoid": np.log((1 + np.sqrt(0.98)) / (1 - np.sqrt(0.98))),  # s(1 - s) = 0.005
        "tanh": np.arctanh(np.sqrt(0.995)),  # 1 - tanh^2 = 0.005
        "hard_tanh": 1.0,
    }
    for name, x in edge.items():
        assert abs(curves.curves[name].saturated - (1 - x / 8)) < 2e-3, name
    assert abs(curves.curves["relu"].saturated - 0.5) < 1e-3
    assert curves.curves["step"].saturated == 1
    for name in ("identity", "leaky_relu", "soft_sign", "squareplus"):
        assert curves.curves[name].saturated == 0, name


def test_the_integral_of_every_derivative_is_its_curve(curves):
    for name in set(curves.curves) - {"step"}:
        y, derivative, *_ = curves.curves[name]
        integral = np.cumsum((derivative[1:] + derivative[:-1]) / 2 * np.diff(curves.x))
        np.testing.assert_allclose(y[1:] - y[0], integral, atol=0.01, err_msg=name)


def test_softmax_against_zero_is_sigmoid(curves):
    np.testing.assert_allclose(curves.curves["softmax"].y, curves.curves["sigmoid"].y, rtol=1e-12)
    np.testing.assert_allclose(
        curves.curves["softmax"].derivative, curves.curves["sigmoid"].derivative, rtol=1e-12
    )


def test_softplus_is_the_sum_of_sigmoids_from_one_and_not_from_zero(curves):
    """000: greatest error .01058 at x = 0; from i = 0 the sum tends to ln(1 + e^(x + 1))."""
    sums = curves.softplus
    for error, where in ((sums.error_from_one, 0), (sums.error_to_next, -1)):
        greatest, x = activations.worst(curves.x, error)
        assert round(greatest, 5) == 0.01058
        assert abs(x - where) < 1e-9
    assert abs(activations.worst(curves.x, sums.error_from_zero)[0] - 1) < 1e-3
    zero = len(curves.x) // 2
    assert (sums.y[zero] + sums.error_from_one[zero]).round(6) == 0.682569


# ---------------------------------------------------------------- softmax-from-bayes


@pytest.fixture(scope="module")
def bayes():
    return softmax_from_bayes.run(softmax_from_bayes.Config(grid=41, examples=2000, epochs=200))


def test_softmax_is_the_posterior_of_bayes_rule(bayes):
    for posterior in (bayes.shared, bayes.own):
        assert posterior.difference < 1e-13
        assert posterior.difference == np.abs(posterior.softmax - posterior.bayes).max()
        np.testing.assert_allclose(posterior.softmax.sum(-1), 1, rtol=1e-12)
        assert set(posterior.bayes.argmax(-1).ravel()) == {0, 1, 2}


def test_softmax_gives_the_posterior_where_the_densities_underflow(bayes):
    softmax, printed = bayes.far
    assert np.isnan(printed).all()
    assert np.isfinite(softmax).all()
    assert softmax.sum() == pytest.approx(1)


def test_a_dense_layer_learns_the_posterior_of_classes_that_share_a_covariance(bayes):
    by_bayes, learnt = bayes.accuracy
    assert by_bayes > 0.85
    assert abs(by_bayes - learnt) < 0.02
    assert bayes.learnt_error < 0.03


# ---------------------------------------------------------------- logistic-regression


@pytest.fixture(scope="module")
def logistic():
    return logistic_regression.run(logistic_regression.Config(steps=3000))


def test_one_neuron_has_the_coefficients_of_scikit_learn(logistic):
    assert np.abs(logistic.coefficients - logistic.scikit_learn).max() < 1e-4
    assert np.abs(logistic.coefficients).min() > 0.5
    assert logistic.gradient < 1e-8


def test_ln_odds_give_the_share_of_malignant_tumours(logistic):
    """At the maximum of the likelihood the mean of P is the share of the class."""
    assert (1 / (1 + np.exp(-logistic.z))).mean() == pytest.approx(
        logistic.malignant.mean(), abs=1e-8
    )
    assert logistic.malignant.sum() == 212


def test_the_interval_of_a_share_is_wilsons_and_has_a_width_at_0_and_1():
    low, high = logistic_regression.wilson(np.array([0.0, 0.5, 1.0]), np.array([57, 100, 57]))
    np.testing.assert_allclose(low, [0, 0.4038, 57 / (57 + 1.96**2)], atol=5e-5)
    np.testing.assert_allclose(high, [1.96**2 / (57 + 1.96**2), 0.5962, 1], atol=5e-5)


def test_weights_grow_without_end_where_the_features_separate_the_classes(logistic):
    data, targets, _ = logistic_regression.tumours()
    solution = logistic_regression.separator(data, targets)
    assert solution is not None
    assert ((2 * targets[:, 0] - 1) * (data @ solution[:-1] + solution[-1]) > 0.99).all()
    values = list(logistic.scaled.values())
    assert values[0] > values[1] > values[2]
    assert values[2] < 1e-20
    of_chosen, of_all = logistic_regression.growth(logistic.norms)
    assert of_all > of_chosen > 1
    assert logistic.norms[0, -1] < np.linalg.norm(logistic.coefficients[:-1])


def test_features_that_separate_the_classes_are_an_error():
    names = tuple(logistic_regression.tumours()[2])
    with pytest.raises(
        ValueError, match="`features` separate the classes without an error, so there is no optimum"
    ):
        logistic_regression.run(dataclasses.replace(logistic_regression.TINY, features=names))


# ---------------------------------------------------------------- gradient-descent


@pytest.fixture(scope="module")
def descent():
    return gradient_descent.run(
        gradient_descent.Config(fractions=(0.1, 0.5, 0.99, 1.01, 1.05), epochs=20)
    )


def test_the_error_is_the_first_one_times_a_power(descent):
    assert descent.difference < 1e-11
    for fraction, errors in zip((0.1, 0.5, 0.99, 1.01, 1.05), descent.errors, strict=True):
        rate = fraction * 2 / 10
        for k in (0, 1, 7):
            np.testing.assert_allclose(
                errors[k], errors[0] * [(1 - rate * 1) ** k, (1 - rate * 10) ** k], atol=1e-12
            )


def test_gradient_descent_diverges_above_two_over_the_curvature_and_not_below(descent):
    steep = np.abs(descent.errors[:, :, 1])
    assert (steep[:3, -1] < steep[:3, 0]).all()
    assert (steep[3:, -1] > steep[3:, 0]).all()


def test_more_steps_an_epoch_are_faster_and_their_noise_sets_a_floor(descent):
    one, some, whole = descent.excess
    assert one[0] == some[0] == whole[0]
    assert one[1] < some[1] < whole[1] < whole[0]
    assert one[-10:].mean() > 3 * some[-10:].mean()
    assert (np.diff(whole) < 0).all()
    assert descent.excess.min() > -1e-6
    assert descent.examples == 353


def test_the_running_mean_is_over_a_tenth_more_and_less_and_ends_as_the_last_tenth():
    excess = np.random.default_rng(0).uniform(size=301)
    mean = gradient_descent.running_mean(excess[1:])
    assert mean.shape == (300,)
    np.testing.assert_allclose(
        mean[[0, 9, 99]], [excess[1], excess[9:12].mean(), excess[90:111].mean()]
    )
    np.testing.assert_allclose(mean[-1], gradient_descent.final(excess[None])[0], atol=0.02)


# ---------------------------------------------------------------- dead-relu


@pytest.fixture(scope="module")
def nets():
    config = dead_relu.Config(
        activations=("relu", "leaky_relu"),
        hidden=32,
        rates=(0.1, 4.0),
        watched=4.0,
        biases=(-1.0, -8.0),
        epochs=3,
    )
    return {(net.activation, net.rate, net.bias): net for net in dead_relu.run(config)}


def test_too_long_a_step_and_a_bad_bias_kill_relu_units_and_no_leaky_ones(nets):
    assert nets["relu", 0.1, 0].share[-1] < 0.1
    assert nets["relu", 4, 0].share[0] < 0.1
    assert nets["relu", 4, 0].share[-1] > 0.9
    assert nets["relu", 0.1, -8].share.tolist() == [1] * 4
    assert 0.1 < nets["relu", 0.1, -1].share[0] < 0.8
    assert all(
        net.ever == 0 and (net.share == 0).all()
        for net in nets.values()
        if net.activation == "leaky_relu"
    )


def test_a_dead_unit_does_not_come_back_nor_move(nets):
    relu = [net for net in nets.values() if net.activation == "relu"]
    assert sum(net.ever for net in relu) > 60
    for net in relu:
        assert net.revived == net.moved == 0
        assert (np.diff(net.share) >= 0).all()
