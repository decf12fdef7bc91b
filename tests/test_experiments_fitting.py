"""What the experiments on fitting claim, at a small size: boundaries, the flower, functions, diabetes and digits."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from experiments import decision_boundary, digits, function_approximation, planar_classification, tabular_regression


@pytest.fixture(autouse=True)
def as_users_run():
    """JAX's own dtype promotion: optax's schedules do not run under the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_more_hidden_units_draw_a_better_boundary():
    """000: 3, 6 and 20 hidden units."""
    config = decision_boundary.Config(widths=(3, 20), epochs=60, starts=3, pixels=10)
    _, (few, many) = decision_boundary.run(config)
    assert few.train_accuracy.mean() < 0.8
    assert many.train_accuracy.mean() > 0.9
    assert many.test_accuracy.mean() > 0.85


def test_the_boundary_shown_is_that_of_the_median_start_and_its_units_are_ramps():
    config = decision_boundary.Config(dataset="moons", widths=(4,), epochs=5, starts=3, pixels=30)
    data, (nets,) = decision_boundary.run(config)
    assert nets.train_accuracy[nets.shown] == np.median(nets.train_accuracy)
    points = decision_boundary.grid(data, 30).reshape(-1, 2)
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
    _, result = planar_classification.run(planar_classification.Config(steps=300, starts=3, pixels=5))
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
    np.testing.assert_allclose(wide.residual, config.noise, rtol=0.3)  # what is left of the samples is their noise


def test_the_nets_of_fnn_and_scikit_learn_predict_diabetes_alike_and_ridge_as_well():
    """001: regression on a table of measured data."""
    splits = tabular_regression.run(tabular_regression.Config(epochs=40, splits=3))
    mean, ridge, ours, theirs = (np.array(values) for values in tabular_regression.errors(splits).values())
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
    np.testing.assert_array_equal(result.confusion.sum(0), np.bincount(result.answers, minlength=10))
    np.testing.assert_allclose(np.trace(result.confusion) / len(data.t_test), result.test_accuracy, rtol=1e-6)
    worst = digits.worst(data, result)
    assert len(worst) == len(data.t_test) - np.trace(result.confusion) > 0
    assert (result.answers[worst] != data.t_test[worst]).all()
    assert (np.diff(result.losses[worst]) <= 0).all()
    assert result.losses[worst].min() > np.log(2) - 1e-6  # the right class of a wrong answer has a probability below 1/2


BAD_FLAGS = [
    (decision_boundary, {"dataset": "spiral"}, r"Unknown dataset 'spiral'. Did you mean 'spirals'"),
    (decision_boundary, {"widths": ()}, r"`widths` must be one to six whole numbers above 0, got \(\)"),
    (decision_boundary, {"widths": (3, 0)}, r"`widths\[1\]` must be a whole number above 0, got 0"),
    (decision_boundary, {"activation": "tahn"}, r"Did you mean 'tanh'"),
    (planar_classification, {"hidden": 0}, r"`hidden` must be a whole number above 0, got 0"),
    (planar_classification, {"learning_rate": -1.0}, r"`learning_rate` must be a finite number above 0, got -1.0"),
    (function_approximation, {"widths": ()}, r"`widths` is empty"),
    (function_approximation, {"noise": 0.0}, r"`noise` must be a finite number above 0, got 0.0"),
    (function_approximation, {"batch_size": 500}, r"`batch_size` is 500 but `data` has only 200 examples"),
    (function_approximation, {"seed": -1}, r"`seed` must be in 0 \.\.\. 2\*\*32 - 1, got -1"),
    (tabular_regression, {"sizes": ()}, r"`sizes` is empty"),
    (tabular_regression, {"splits": 0}, r"`splits` must be a whole number above 0, got 0"),
    (digits, {"dataset": "minst"}, r"Unknown dataset 'minst'. Did you mean 'mnist'"),
    (digits, {"epochs": 0}, r"`epochs` must be a whole number above 0, got 0"),
]


@pytest.mark.parametrize(("module", "flags", "message"), BAD_FLAGS, ids=[f"{m.__name__[12:]}-{f}" for m, f, _ in BAD_FLAGS])
def test_a_bad_flag_is_an_error_that_names_it(module, flags, message):
    with pytest.raises(ValueError, match=message):
        module.run(dataclasses.replace(module.TINY, **flags))
