"""What the experiments on gradients, graphs and single examples claim, at small configs.

And that their titles say when it is not so.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
import pytest
from jax.nn.initializers import he_normal, normal

import fnn
from experiments import (
    _data,
    _run,
    activations,
    alignment_angles,
    compare_gradients,
    computation_graph,
    credit_assignment,
    dead_relu,
    derivatives,
    digits,
    influence,
    per_example,
)


@pytest.fixture(scope="module", autouse=True)
def as_users_run():
    """JAX's own dtype promotion, for optax's schedules."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ---------------------------------------------------------------- influence


@pytest.fixture(scope="module")
def influences():
    config = influence.Config(
        sizes=(8,), epochs=2, batch_size=64, learning_rate=0.3, test_images=60, top=2, pairs=30
    )
    return config, *influence.run(config)


def test_what_helps_a_test_image_carries_its_label_and_what_hurts_it_another(influences):
    config, data, result = influences
    helpers, hurters, _ = influence.shares(data, result, config.top).values()
    assert helpers > 0.8
    assert hurters > 0.95


def test_a_step_on_an_image_changes_a_test_loss_as_predicted_the_better_the_smaller_it_is(
    influences,
):
    _, _, result = influences
    predicted, measured = np.moveaxis(result.changes, 1, 0)
    assert result.off == pytest.approx(
        tuple(np.linalg.norm(predicted - measured, axis=1) / np.linalg.norm(measured, axis=1))
    )
    assert result.off[0] < 0.1
    # what is left out is of the second order
    assert result.off[1] == pytest.approx(result.off[0] / 100, rel=0.2)
    assert np.abs(measured[1]).max() > 1e-6


def test_the_title_of_influence_denies_what_was_not_measured(influences):
    config, data, result = influences
    assert "change a loss as predicted (" in influence.sentence(data, result, config)
    title = influence.sentence(data, result._replace(off=(0.7, 0.01), said=data.t_test + 1), config)
    assert "as predicted only if the step is small (70 % off" in title
    assert "With 0.0 % of the test images right" in title
    for off in ((0.1, 0.5), (np.nan, np.nan)):
        assert "NOT as predicted" in influence.sentence(data, result._replace(off=off), config)


# ---------------------------------------------------------------- per-example


@pytest.fixture(scope="module")
def per_examples():
    config = per_example.Config(
        sizes=(32,), learning_rate=0.3, epochs=5, measurements=2, seeds=(0,)
    )
    return per_example.run(config)


def test_the_largest_norms_and_losses_are_those_of_wrong_labels(per_examples):
    (result,) = per_examples
    assert result.wrong.sum() == 72
    for scores in (result.norms, result.losses):
        assert per_example.precision_at(scores, result.wrong) > 0.6
    assert "The largest gradients point at wrong labels" in per_example.sentence(per_examples)


def test_precision_is_that_of_the_largest_scores():
    wrong = np.array([False, True, True, False, True])
    scores = np.array([3.0, 5.0, 1.0, 4.0, 2.0])
    assert per_example.hits(scores, wrong).tolist() == [1, 1, 1, 2, 3]
    assert per_example.precision_at(scores, wrong, np.array([1 / 3, 2 / 3, 1])).tolist() == [
        1,
        2 / 4,
        3 / 5,
    ]


def test_the_title_denies_that_norms_point_at_wrong_labels_where_they_do_not(per_examples):
    (result,) = per_examples
    noise = np.random.default_rng(0).uniform(size=result.norms.shape)
    title = per_example.sentence((result._replace(norms=noise),))
    assert "do NOT point at wrong labels" in title
    assert "(5 % by chance)" in title
    assert "more often than by chance" in per_example.sentence(
        (result._replace(norms=noise + 0.45 * result.wrong),)
    )
    turned = result._replace(noise=result.noise * np.array([[1, 1], [-1, -1]]))
    assert "ends at more examples than can be told" in per_example.sentence((turned,))


# ---------------------------------------------------------------- compare-gradients


@pytest.fixture(scope="module")
def compared():
    return compare_gradients.run(
        dataclasses.replace(compare_gradients.TINY, epochs=3, batch_size=128, learning_rate=0.01)
    )


def test_gradients_agree_before_and_after_training(compared):
    assert compared.before.passed
    assert compared.after.passed
    assert compared.history.loss[-1] < 0.8 * compared.history.loss[0]
    assert [leaf.relative_error for leaf in compared.before.leaves] != [
        leaf.relative_error for leaf in compared.after.leaves
    ]
    assert (compared.to_float64[0] != compared.to_float64[1]).all()
    assert 1e-9 < compared.to_float64.max() < 1e-4


def test_distances_are_those_to_the_gradient_in_float64():
    net, loss = fnn.mlp((3, 4, 2), "tanh"), fnn.losses.softmax_cross_entropy_with_integer_labels
    params, x, t = (
        net.init(fnn.key(0)),
        np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32),
        np.arange(50) % 2,
    )
    report = fnn.compare_gradients(net, loss, params, x, t, tolerance=1e-30)
    found = compare_gradients.distances(net, loss, params, x, t)
    assert found.shape == (2, 4)
    for leaf, both in zip(report.leaves, found.T, strict=True):
        if leaf.against_float64:
            np.testing.assert_allclose(both, leaf.against_float64, rtol=1e-6)
    doubled = dataclasses.replace(
        net, backward=lambda params, residuals, dy: net.backward(params, residuals, 2 * dy)
    )
    np.testing.assert_allclose(
        compare_gradients.distances(doubled, loss, params, x, t)[0], 1, rtol=1e-5
    )


def test_the_title_says_where_gradients_differ(compared):
    assert "agree with those of jax.grad" in compare_gradients.sentence(compared)
    other = compared._replace(after=compared.after._replace(passed=False))
    assert "DIFFER from those of jax.grad" in compare_gradients.sentence(other)


# ---------------------------------------------------------------- computation-graph


@pytest.fixture(scope="module")
def graphs():
    return list(computation_graph.run(computation_graph.TINY).examples.values())


def test_the_graphs_have_the_figures_of_the_lectures(graphs):
    figures = [
        (10.909297, (4.583853, 2)),
        (4, (4, 3, 2)),
        (2, (-2, 1, 0.5)),
        (-20, (-8, 6, 2, 0)),  # mul swaps the multipliers, max routes
        (0.5, (-0.5, 0.25, 0.125)),  # the slope of the sigmoid at 0 is a quarter
        (0.731059, (-0.1966, -0.3932, 0.1966, 0.3932, -0.5898)),
    ]
    for example, (value, gradient) in zip(graphs, figures, strict=False):
        assert example.value == pytest.approx(value, abs=5e-7)
        np.testing.assert_allclose(example.gradient, gradient, atol=5e-5)
    z = {
        node.name: float(node.value) for node in graphs[1].graph.nodes if node.name.startswith("z")
    }
    assert list(z.values()) == [1, 6, 2, 4, 4]
    assert len(graphs) == len(computation_graph.EXAMPLES) + 1 == len(figures) + 1


def test_a_gradient_that_differs_from_jax_is_seen_and_said(graphs, monkeypatch):
    assert max(example.difference for example in graphs) < 1e-6
    right = fnn.graph.Graph.gradients
    monkeypatch.setattr(
        fnn.graph.Graph, "gradients", lambda self: tuple(g + 0.5 for g in right(self))
    )
    wrong = computation_graph._example(computation_graph.polynomial, 1.0, 2.0, 3.0)
    assert wrong.difference == pytest.approx(0.5)
    assert computation_graph.sentence([graphs[0], wrong]).endswith("within 5e-01 of jax.grad")
    assert computation_graph.sentence([graphs[0]._replace(difference=0.0)]).endswith(
        "equal to jax.grad"
    )


def test_panels_fill_rows_in_order():
    assert computation_graph.in_rows([3, 2, 4, 5], 5) == [[0, 1], [2], [3]]
    assert computation_graph.in_rows([5], 5) == [[0]]


# ---------------------------------------------------------------- derivatives


@pytest.fixture(scope="module")
def found():
    return derivatives.run(derivatives.Config())


def test_the_exact_ways_agree_and_the_numeric_one_comes_near(found):
    assert derivatives.apart(found.ways) < 1e-14
    for d in found.ways.values():
        np.testing.assert_allclose(d.numeric, d.reverse, rtol=1e-8)
    square = found.ways[derivatives.SQUARE]
    assert square.symbolic[0] == square.forward[0] == square.reverse[0] == 6
    wrong = dataclasses.replace(square, symbolic=square.symbolic + 0.25)
    assert derivatives.apart({"wrong": wrong}) == 0.25
    assert "agree within 2e-01" in derivatives.sentence(found._replace(ways={"wrong": wrong}))


def test_the_error_falls_with_the_square_of_the_step_until_rounding_takes_over(found):
    for name, d in found.beside["float64"].items():
        if name == derivatives.SQUARE:
            assert d.value == pytest.approx(3.1**2)
            assert 0 < d.errors[0] < 1e-13  # no truncation
        else:
            assert 90 < d.errors[1] / d.errors[2] < 110
            assert 1e-7 < d.steps[d.errors.argmin()] < 1e-4
            assert d.errors[-1] > 1e4 * d.errors.min() > 0
    for name, d in found.beside["float32"].items():
        assert name == derivatives.SQUARE or 5e-5 < d.steps[d.errors.argmin()] < 5e-2


def test_the_total_derivative_is_the_sum_of_the_products(found):
    """000 along (2t, 5t^2): 4.583853 * 2 + 2 * 10.

    003 along (t, 2t^2, 3t^3), where f = 6 t^7 - 2 t^4: 42 - 8.
    """
    totals = list(found.totals.values())
    for total, by_hand in zip(totals, (4.583853163 * 2 + 2 * 10, 34), strict=False):
        assert total.chain == pytest.approx(by_hand, abs=1e-8)
    for total in totals:
        np.testing.assert_allclose([total.forward, total.composed], total.chain, rtol=1e-14)


# ---------------------------------------------------------------- dead-relu and activations


def test_a_net_that_diverges_kills_and_revives_no_unit():
    config = dataclasses.replace(
        dead_relu.TINY, hidden=64, rates=(0.1, 1e30), watched=1e30, epochs=1
    )
    runs = dead_relu.run(config)
    found = {(r.activation, r.rate, r.bias): r for r in runs}
    for r in (found["relu", 1e30, 0], found["leaky_relu", 1e30, 0]):
        assert np.isnan(r.share[-1])
        assert r.ever == round(64 * r.share[0])
        assert r.revived == r.moved == 0
    assert [found["relu", rate, bias].ever for rate, bias in ((1e30, 0), (0.1, 0), (0.1, -4))] == [
        1,
        1,
        64,
    ]
    title = dead_relu.sentence(runs, config)
    assert (
        "these nets have diverged: relu, leaky_relu; of 66 units that died in all 6 nets none came "
        "back" in title
    )
    assert "are dead" not in title


def test_sigmoid_and_relu_are_not_zero_centred_and_tanh_is():
    """002: the mean output for inputs from N(0, 1)."""
    curves = activations.run(activations.TINY).curves
    assert curves["sigmoid"].mean == pytest.approx(0.5, abs=1e-12)
    assert curves["relu"].mean == pytest.approx(1 / np.sqrt(2 * np.pi), abs=5e-3)
    assert curves["tanh"].mean == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- flags

BAD_FLAGS = [
    (compare_gradients, {"epochs": 0}, "`epochs` must be a whole number above 0, got 0"),
    (compare_gradients, {"batch_size": -3}, "`batch_size` must be a whole number above 0, got -3"),
    (compare_gradients, {"sizes": (-4,)}, r"`sizes\[0\]` must be a whole number above 0, got -4"),
    (
        compare_gradients,
        {"learning_rate": -1.0},
        "`learning_rate` must be a finite number above 0, got -1.0",
    ),
    (
        compare_gradients,
        {"weight_decay": -0.1},
        "`weight_decay` must be a finite number from 0 on, got -0.1",
    ),
    (compare_gradients, {"activation": "rleu"}, "Did you mean 'relu'"),
    (influence, {"batch_size": 0}, "`batch_size` must be a whole number above 0, got 0"),
    (influence, {"sizes": (-4,)}, r"`sizes\[0\]` must be"),
    (influence, {"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0, got 0.0"),
    (influence, {"top": 1437}, "`top` must be at most 8"),
    (per_example, {"flipped": float("nan")}, "`flipped` must be a share between 0 and 1, got nan"),
    (per_example, {"learning_rate": -1.0}, "`learning_rate` must be a finite number above 0"),
    (per_example, {"sizes": (-4,)}, r"`sizes\[0\]` must be"),
    (per_example, {"seeds": (1, 1)}, "`seeds` has repeats"),
    (
        per_example,
        {"measurements": 20},
        "`batch_size` must be at most 71, the examples from one of 20 measurements to the next; "
        "got 128",
    ),
    (computation_graph, {"sizes": (3,)}, "`sizes` must be those of inputs and outputs at least"),
    (computation_graph, {"batch": 0}, "`batch` must be a whole number above 0, got 0"),
    (derivatives, {"x": 1e200}, "`x` must be a number from -1e6 to 1e6, got 1e"),
    (derivatives, {"x": float("nan")}, "`x` must be a number from -1e6 to 1e6, got nan"),
    (activations, {"limit": 1e6}, "`limit` must be at most 100"),
    (dead_relu, {"rates": (0.1, -1.0)}, r"`rates\[1\]` must be a finite number above 0, got -1.0"),
    (digits, {"weight_decay": -1.0}, "`weight_decay` must be a finite number from 0 on"),
    (digits, {"sizes": (0,)}, r"`sizes\[0\]` must be"),
]
MODULES = (compare_gradients, computation_graph, derivatives, influence, per_example)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    BAD_FLAGS,
    ids=[f"{m.__name__[12:]} {flags}" for m, flags, _ in BAD_FLAGS],
)
def test_a_bad_flag_is_an_error_that_names_it(module, flags, message):
    with pytest.raises(ValueError, match=message):
        module.run(dataclasses.replace(module.TINY, **flags))


@pytest.mark.parametrize("module", MODULES, ids=[m.__name__[12:] for m in MODULES])
def test_a_folder_that_cannot_be_made_stops_before_the_run(module, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(OSError, match="file"):
        module.main(dataclasses.replace(module.TINY, out=tmp_path / "file" / "run"))


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        _run.folder("train", tmp_path / "new")


# ---------------------------------------------------------------- credit assignment


DRAWN = {
    "forward gradient, weights",
    "node perturbation",
    "weight perturbation",
    "evolution strategies",
    "SNES",
    "genetic algorithm",
}


@pytest.mark.parametrize("name", [name for name in credit_assignment.METHODS if name not in DRAWN])
def test_passes_are_the_operations_that_xla_counts(name):
    """But for rules that draw as many numbers as they multiply, or loop over members, which XLA
    counts once."""
    method, net = credit_assignment.METHODS[name], fnn.mlp((64, 128, 128, 10))
    rule = method.make(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    params, key = jax.eval_shape(net.init, fnn.key(0)), jax.eval_shape(jax.random.key, 0)
    x, labels = jax.ShapeDtypeStruct((32, 64), "float32"), jax.ShapeDtypeStruct((32,), "int32")
    step = rule.value_and_grad, params, jax.eval_shape(rule.init, key, params), x, labels
    count, forward = (
        jax.jit(f).lower(*given).compile().cost_analysis()["flops"]
        for f, *given in (step, (net.apply, params, x))
    )
    assert abs(method.passes - count / forward) < 0.5


REACHED = {  # Adam's rate, and what the net must reach on digits, in percent
    "backprop": (3e-3, 97),
    "feedback alignment": (3e-3, 95),
    "direct feedback alignment": (3e-3, 95),
    "Kolen-Pollack": (3e-3, 95),
    "sign-symmetric": (1e-2, 95),
    "forward-forward": (3e-3, 93),
    "forward gradient, activities": (3e-3, 90),
}


@pytest.mark.parametrize("name", REACHED)
def test_rules_read_digits(name):
    (rate, least), method, data = (
        REACHED[name],
        credit_assignment.METHODS[name],
        _data.load("digits"),
    )
    net = fnn.mlp((64, 128, 128, 10))
    rule, params = method.make(net, data.loss), jax.jit(net.init)(fnn.key(5))
    settings = {"epochs": 30, "batch_size": 32, "key": fnn.key(6)}
    params, _ = fnn.fit(
        rule, method.optimizer(rate), params, (data.x_train, data.t_train), **settings
    )
    assert 100 * fnn.evaluate(rule, params, (data.x_test, data.t_test))["accuracy"] >= least


# ---------------------------------------------------------------- alignment angles


def test_updates_turn_towards_the_gradient():
    """On digits, from a start of small weights.

    Feedback alignment to below 50 degrees, Kolen and Pollack's feedback to below 15.
    """
    config = alignment_angles.Config(seeds=(0,))
    sizes = (64, *config.hidden, 10)
    net, he = (fnn.mlp(sizes, kernel_init=draw) for draw in (normal(config.std), he_normal()))
    fixed, _, kolen_pollack, _ = alignment_angles.made(config, net, he.init)
    for (rule, decay), most in ((fixed, 50), (kolen_pollack, 15)):
        curve = alignment_angles.digits(config, rule, decay, net, "small")
        assert 80 < curve.first < 100
        assert curve.last[0] < most
