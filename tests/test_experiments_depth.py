"""What the experiments about depth, initial weights and names claim, at small configs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from experiments import (
    linear_collapse,
    names,
    vanishing_gradients,
    wide_net_saturation,
    zero_initialisation,
)

# ---------------------------------------------------------------- linear-collapse


@pytest.fixture(scope="module")
def collapsed():
    """Two moons: a net without activations, and one with, 3 layers of 16 each."""
    config = linear_collapse.Config(
        dataset="moons", depth=3, width=16, depths=(4,), learning_rate=0.01, epochs=30
    )
    return linear_collapse.run(config)[1]


def test_a_net_without_activations_is_its_matrix_and_one_with_them_is_not(collapsed):
    linear, nonlinear = collapsed.linear, collapsed.nonlinear
    assert linear.difference < 1e-13
    assert linear.same_answers == 1
    assert linear.accuracy == linear.matrix_accuracy
    assert abs(linear.accuracy - collapsed.logistic_accuracy) < 0.03
    assert nonlinear.difference > 0.1
    assert nonlinear.accuracy > max(linear.accuracy, nonlinear.matrix_accuracy) + 0.05
    assert max(collapsed.differences["identity"]) < 1e-13
    assert min(collapsed.differences["relu"] + collapsed.differences["tanh"]) > 1e-3


def test_the_title_denies_a_collapse_that_was_not_measured(collapsed):
    assert "are one matrix" in linear_collapse.sentence(collapsed, 3)
    other = collapsed._replace(linear=collapsed.linear._replace(difference=1e-3))
    assert "are NOT one matrix (outputs differ by 1e-03)" in linear_collapse.sentence(other, 3)


def test_the_title_opposes_the_two_accuracies_only_where_they_differ(collapsed):
    assert ", but " in linear_collapse.sentence(collapsed, 3)
    alike = collapsed.nonlinear._replace(accuracy=0.43, matrix_accuracy=0.43)
    assert linear_collapse.sentence(collapsed._replace(nonlinear=alike), 3).endswith(
        "43.0 %, and as many once multiplied out"
    )


# ---------------------------------------------------------------- vanishing-gradients


@pytest.fixture(scope="module")
def gradients():
    return vanishing_gradients.grid(
        vanishing_gradients.run(vanishing_gradients.Config(depths=(12,), examples=50))
    )


def test_sigmoid_layers_pass_on_at_most_a_quarter_each(gradients):
    """003: the product of sigma' <= 1/4 is at most .25^L.

    With orthogonal weights it is all there is, and not far below.
    """
    (cell,) = gradients["sigmoid", "orthogonal"]
    assert 0.2 < cell.step <= 0.25
    assert 0.2**11 < cell.ratio <= 0.25**11


def test_the_initialiser_decides_whether_a_relu_net_keeps_its_gradient(gradients):
    fan_in, he, unit = (
        gradients["relu", name][-1].ratio
        for name in ("N(0, 1/fan_in)", "N(0, 2/fan_in)", "N(0, 1)")
    )
    assert fan_in < 0.1
    assert 0.3 < he < 3
    assert unit > 1e6
    # sqrt(2) for each of the 11 layers between, but for what other logits change
    assert 0.5 < he / fan_in / 2**5.5 < 2


def test_the_norms_are_those_of_the_gradient_of_the_biases():
    config = vanishing_gradients.Config(depths=(3,), examples=1)
    cells = vanishing_gradients.grid(vanishing_gradients.run(config))
    data = vanishing_gradients.load("digits", seed=0)
    with jax.enable_x64(True):
        hidden, last = vanishing_gradients.draw_params(config)["N(0, 1/fan_in)"]
        params = (*((jax.tree.map(lambda leaf, i=i: leaf[i], hidden), ()) for i in range(3)), last)
        gradient = fnn.value_and_grad(fnn.mlp((64, 64, 64, 64, 10), "tanh"), data.loss)
        _, grads = gradient(params, data.x_train[:1].astype(np.float64), data.t_train[:1])
        norms = [float(jnp.linalg.norm(layer[0].b)) for layer in grads[:3]]
    np.testing.assert_allclose(cells["tanh", "N(0, 1/fan_in)"][0].norms, norms, rtol=1e-12)


# ---------------------------------------------------------------- zero-initialisation


@pytest.fixture(scope="module")
def from_zero():
    return zero_initialisation.run(zero_initialisation.Config())


def test_sigmoid_units_that_start_at_zero_are_identical_after_2000_steps(from_zero):
    """004, eqs 14-20."""
    zero, random = from_zero.nets["sigmoid zero"], from_zero.nets["sigmoid random"]
    assert zero.loss.shape == (2000,)
    assert zero.spread.shape == (2001,)  # before the first step and after each, the last one too
    assert zero.spread.max() == 0
    assert zero.others_moved > 0.1  # they have learnt, all the same
    assert random.spread.min() > 0.5
    assert random.loss[-1] < 0.5 * zero.loss[-1]
    assert zero.accuracy <= 1 - from_zero.share + 1e-6


def test_of_a_relu_net_from_zero_only_the_last_bias_moves_to_the_logit_of_the_mean(from_zero):
    """004, eqs 14-20."""
    zero = from_zero.nets["relu zero"]
    assert zero.others_moved == 0
    assert from_zero.share == pytest.approx(67 / 267)
    random = from_zero.nets["relu random"]
    assert (random.weights[-1] != random.weights[-2]).any()  # the last step counts
    assert zero.last_bias[:2] == pytest.approx([0, -0.5 * (0.5 - 67 / 267)])  # the first step
    assert zero.last_bias[-1] == pytest.approx(math.log(67 / 200), abs=1e-5)
    assert from_zero.nets["relu random"].others_moved > 1


# ---------------------------------------------------------------- wide-net-saturation


def test_unscaled_weights_saturate_a_wide_net_as_the_normal_distribution_says():
    """004: N(0, 1) against N(0, 1/fan_in)."""
    curves = wide_net_saturation.run(
        wide_net_saturation.Config(widths=(100, 400), layers=2, examples=100, nets=2)
    )
    found = {(curve.activation, curve.weights): curve for curve in curves}
    for (_, weights), curve in found.items():
        np.testing.assert_allclose(curve.saturated[:, 0], curve.expected, atol=0.02)
        if weights == "N(0, 1)":
            assert curve.saturated[1, 0] > 0.8
            # falls with 1 / sqrt(width)
            assert curve.slope[0, 0] / curve.slope[1, 0] == pytest.approx(2, rel=0.1)
        else:
            assert curve.saturated.max() < 0.02
            assert curve.slope.min() > 0.5
    title = wide_net_saturation.sentence(curves, wide_net_saturation.Config(widths=(100, 400)))
    assert title.startswith("In the first layer, 400 units wide, weights from N(0,")
    assert f"saturate {100 * found['tanh', 'N(0, 1)'].saturated[1, 0]:.2g} % of tanh" in title
    assert found["tanh", "N(0, 1)"].expected[1] == pytest.approx(
        math.erfc(math.atanh(0.99) / 20 / math.sqrt(2))
    )


def test_saturated_is_within_one_percent_of_the_limit():
    assert math.tanh(wide_net_saturation.LIMITS["tanh"]) == pytest.approx(0.99)
    assert 1 / (1 + math.exp(-wide_net_saturation.LIMITS["sigmoid"])) == pytest.approx(0.99)


# ---------------------------------------------------------------- names


def test_flatten_is_a_layer():
    layer = names.flatten(3, 2)
    x = jax.random.normal(fnn.key(0), (4, 3, 2))
    np.testing.assert_array_equal(
        layer.apply((), x)[1], jnp.concatenate([x[1, 0], x[1, 1], x[1, 2]])
    )
    assert fnn.check_layer(layer, x, key=fnn.key(1)).passed
    assert fnn.check_layer(
        names.make_net(names.TINY), jnp.array([[0, 1, 26], [5, 5, 0]]), key=fnn.key(2)
    ).passed


def test_every_character_has_the_three_before_it():
    x, t = names.examples(["ab", "c"])
    assert x.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 3]]
    assert t.tolist() == [1, 2, 0, 3, 0]


def test_no_name_is_in_two_parts():
    repeated = [f"{a}{b}" for a in "abcdefghij" for b in "abcdefghij"] * 2
    parts = [set(part) for part in names.split(repeated, seed=0)]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert set.union(*parts) == set(repeated)
    assert sum(map(len, names.split(repeated, seed=0))) == len(repeated)


def test_the_bigram_model_counts_pairs():
    train = np.array([[0, 0, 1], [0, 0, 1], [0, 1, 2]]), np.array([2, 0, 2])
    held_out = np.array([[9, 9, 1]]), np.array([2])
    assert names.bigram_losses(train, [held_out]) == (pytest.approx(-math.log(2 / 29)),)


def test_names_with_other_characters_are_left_out_and_counted(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\n".join(["Ann", "josé", "", "o'brien", *"abcdefghijk"]))
    found, left_out = names.read_names(file, "first")
    assert found == ["ann", *"abcdefghijk"]
    assert left_out == 2


@pytest.mark.usefixtures("as_users_run")
def test_the_net_beats_the_bigram_model_on_the_census():
    result = names.run(names.Config(hidden=64, embedding_scale=1.0, epochs=4, samples=50))
    assert sum(result.names) == 5163
    assert result.start == pytest.approx(math.log(27), abs=0.05)
    assert result.losses[1] < result.bigram[1] - 0.1
    assert len(set(result.samples)) > 40
    assert all(set(name) <= set(names.CHARACTERS) - {"."} for name in result.samples)


@pytest.mark.usefixtures("as_users_run")
def test_the_net_comes_below_2_2_nats_on_32033_names(shared_data):
    result = names.run(
        names.Config(file=shared_data / "names.txt", hidden=100, embedding_scale=1.0, epochs=3)
    )
    assert sum(result.names) == 32033
    assert result.start == pytest.approx(3.30, abs=0.05)
    assert result.losses[1] <= 2.20
    assert result.bigram[1] > 2.4
