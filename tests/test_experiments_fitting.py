"""What the experiments on fitting claim, at a small size.

Boundaries, the flower, functions, diabetes and digits.
"""

from __future__ import annotations

import numpy as np
import pytest

from experiments import (
    decision_boundary,
    digits,
    function_approximation,
    planar_classification,
    private_training,
    tabular_regression,
)
from experiments._plane import grid

pytestmark = pytest.mark.usefixtures("as_users_run")


def test_more_hidden_units_draw_a_better_boundary():
    """000: 3, 6 and 20 hidden units."""
    config = decision_boundary.Config(widths=(3, 6, 20), epochs=60, starts=3, pixels=10)
    _, nets = decision_boundary.run(config)
    assert [n.units for n in nets] == [3, 6, 20]
    few, some, many = (n.train_accuracy.mean() for n in nets)
    assert few < 0.8
    assert few + 0.02 < some < many - 0.05
    assert many > 0.9
    assert nets[-1].test_accuracy.mean() > 0.85


def test_the_boundary_shown_is_that_of_the_median_start_and_its_units_are_ramps():
    config = decision_boundary.Config(dataset="moons", widths=(4,), epochs=5, starts=3, pixels=30)
    data, (nets,) = decision_boundary.run(config)
    assert nets.train_accuracy[nets.shown] == np.median(nets.train_accuracy)
    points = grid(decision_boundary.edges(data), 30).reshape(-1, 2)
    nearest = ((data.x_train[:, None] - points[None]) ** 2).sum(-1).argmin(1)
    accuracy = ((nets.probability.ravel()[nearest] > 0.5) == data.t_train).mean()
    np.testing.assert_allclose(accuracy, nets.train_accuracy[nets.shown], atol=0.05)
    affine = np.column_stack([points, np.ones(len(points))])
    for unit in nets.unit_maps:  # a unit is tanh of an affine function of the plane
        inside = np.abs(unit.ravel()) < 0.99
        z = np.arctanh(unit.ravel()[inside])
        fitted = affine[inside] @ np.linalg.lstsq(affine[inside], z, rcond=None)[0]
        np.testing.assert_allclose(fitted, z, atol=1e-3)


def test_four_hidden_units_classify_the_flower_and_logistic_regression_does_not():
    """004: about 90 % against about 50 %."""
    _, result = planar_classification.run(
        planar_classification.Config(steps=300, starts=3, pixels=5)
    )
    assert result.hidden.train_accuracy.mean() > 0.85
    assert result.hidden.test_accuracy.mean() > 0.8
    assert result.logistic.train_accuracy.max() < 0.6
    assert 0.6 < result.logistic.loss[:, -1].min() < np.log(2) + 1e-3
    np.testing.assert_allclose(result.logistic.train_accuracy, result.sklearn[0], atol=0.01)
    np.testing.assert_allclose(result.logistic.test_accuracy, result.sklearn[1], atol=0.02)


def test_the_error_of_a_fit_falls_with_the_width_to_below_the_noise():
    """001: approximating an unknown function."""
    config = function_approximation.Config(widths=(1, 32), starts=3)
    narrow, wide = function_approximation.run(config).fits
    assert narrow.error.min() > 0.5
    assert wide.error.max() < config.noise
    # what is left of the samples is their noise
    np.testing.assert_allclose(wide.residual, config.noise, rtol=0.3)


def test_the_nets_of_fnn_and_scikit_learn_predict_diabetes_alike_and_ridge_as_well():
    """001: regression on a table of measured data."""
    splits = tabular_regression.run(tabular_regression.Config(epochs=40, splits=3))
    mean, ridge, ours, theirs = (
        np.array(values) for values in tabular_regression.errors(splits).values()
    )
    np.testing.assert_allclose(ours, theirs, atol=0.06)
    for errors in (ridge, ours, theirs):
        assert (errors < mean - 0.1).all()
    assert ridge.mean() < ours.mean() + 0.01
    assert all(split.fnn.shape == split.sklearn.shape == (40,) for split in splits)


def test_digits_are_read_and_the_mistakes_are_told_right():
    """001: image recognition."""
    data, result = digits.run(digits.Config(sizes=(32,), epochs=20))
    assert result.test_accuracy > 0.94
    assert result.train_accuracy > result.test_accuracy
    np.testing.assert_array_equal(result.confusion.sum(1), np.bincount(data.t_test))
    np.testing.assert_array_equal(
        result.confusion.sum(0), np.bincount(result.answers, minlength=10)
    )
    np.testing.assert_allclose(
        np.trace(result.confusion) / len(data.t_test), result.test_accuracy, rtol=1e-6
    )
    worst = digits.worst(data, result)
    assert len(worst) == len(data.t_test) - np.trace(result.confusion) > 0
    assert (result.answers[worst] != data.t_test[worst]).all()
    assert (np.diff(result.losses[worst]) <= 0).all()
    # the right class of a wrong answer has a probability below 1/2
    assert result.losses[worst].min() > np.log(2) - 1e-6


def test_digits_of_mnist_are_read(shared_data):
    """001: image recognition."""
    config = digits.Config(
        dataset="mnist", data_dir=shared_data / "mnist", sizes=(32,), epochs=1, batch_size=100
    )
    data, result = digits.run(config)
    assert data.features == 28 * 28
    assert result.test_accuracy > 0.8
    assert result.confusion.sum() == 10_000


# ---------------------------------------------------------------- private-training


def test_the_cost_of_privacy_is_what_is_missing_to_the_baseline_at_each_sets_own_epsilon():
    accuracy = np.array([[0.5, 0.6], [0.9, 0.92], [0.95, 0.95]])
    first = private_training.Curve(
        "digits", 1437, 40, 0.25, np.array([0.3, 1.9, 9.0]), accuracy, np.array([0.96, 0.98])
    )
    second = first._replace(
        dataset="mnist", epsilon=np.array([0.3, 0.9, 3.5]), baseline=np.array([0.99, 0.99])
    )
    title = private_training.sentence(private_training.Result((first, second), {})).replace(
        "\N{NO-BREAK SPACE}", " "
    )
    expected = (
        "Privacy costs 6.0 points of test accuracy on digits at ε = 1.9 and 4.0 on mnist at ε = 3.5"
    )
    assert title == f"{expected} (mean of 2 seeds, bars: standard deviation)"
