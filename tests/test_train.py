"""Training: the loop does what a plain Python loop does, uses every example, compiles once and
stops where it must."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import error, wide

import fnn
from fnn import losses, rules, training
from fnn.sharding import padded
from fnn.training.data import epoch_seeds, shuffled_batches

LOSS = losses.softmax_cross_entropy_with_integer_labels
NET = fnn.mlp((5, 6, 3), "tanh")
RULE = rules.backprop(NET, LOSS)
KEY = jax.random.key(7)


def blobs(n=23):
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, n).astype(np.int32)
    return (rng.normal(size=(n, 5)) + 3 * np.eye(3, 5)[t][:, ::-1]).astype(np.float32), t


PARAMS = jax.jit(NET.init)(jax.random.key(0))


@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_a_plain_loop_over_shuffled_batches(weighted):
    x, t = blobs()
    weights = np.linspace(0.5, 2, len(x), dtype=np.float32)
    data = (x, t, weights) if weighted else (x, t)
    params, history = fnn.fit(RULE, optax.sgd(0.3), PARAMS, data, epochs=2, batch_size=4, key=KEY)
    gradient, p, every = jax.jit(fnn.value_and_grad(NET, LOSS)), PARAMS, []
    for seed in epoch_seeds(jax.random.split(KEY)[1], 3)[:2]:
        rows, present = shuffled_batches(seed, len(x), 4)
        order = rows.ravel()[: len(x)]
        assert sorted(order) == list(range(len(x)))  # every example, once
        for i in range(0, len(x), 4):
            r = order[i : i + 4]
            value, g = gradient(
                p, x[r], t[r], weights[r] if weighted else np.ones(len(r), np.float32)
            )
            p = jax.tree.map(lambda w, d: w - 0.3 * d, p, g)
            every.append((value, weights[r].sum() if weighted else len(r)))
        assert present is not None
        assert present.sum() == len(x)
    assert error(wide(params), wide(p)) < 1e-5
    np.testing.assert_allclose(history.step_loss, [v for v, _ in every], rtol=1e-5)
    for e, part in enumerate((every[:6], every[6:])):
        np.testing.assert_allclose(
            history.loss[e],
            np.average([v for v, _ in part], weights=[c for _, c in part]),
            rtol=1e-5,
        )


def test_an_iterable_of_batches_is_the_same_loop():
    x, t = blobs()
    batches = [(x[i : i + 4], t[i : i + 4]) for i in range(0, len(x), 4)]
    rows = np.append(np.arange(len(x), dtype=np.int32), 0).reshape(-1, 4).astype(np.int32)
    present = (np.arange(24) < 23).astype(np.float32).reshape(-1, 4)
    optimizer = optax.sgd(0.3)
    state = training.init(RULE, optimizer, PARAMS, KEY)
    one_step = jax.jit(training.step(RULE, optimizer))
    step_loss = []
    for r, w in zip(rows, present, strict=True):
        state, value = one_step(state, x[r], t[r], w)
        step_loss.append(value)
    mean = np.average(step_loss, weights=present.sum(1))
    for data in (batches, lambda epoch: iter(batches)):
        params, history = fnn.fit(
            RULE, optax.sgd(0.3), PARAMS, data, epochs=1, batch_size=4, key=KEY
        )
        assert error(wide(params), wide(state.params)) < 1e-6
        np.testing.assert_allclose(history.step_loss, step_loss, rtol=1e-5)
        np.testing.assert_allclose(history.loss[0], mean, rtol=1e-5)


GRADIENTS = (rules.backprop, rules.autodiff, rules.per_example_sgd)
# a forward pass of their own; the loss of the best
OWN_VALUE = (rules.forward_forward, rules.genetic_algorithm)
EPOCHS = {rules.forward_forward: 40, rules.weight_perturbation: 30, rules.pepita: 60}
# sgd(1.0) sets what such rules solve for or choose
SOLVERS = (rules.extreme_learning, rules.snes, rules.genetic_algorithm)
FITS = (rules.extreme_learning,)  # least squares: right about the classes, no good logits


def quiet(rule):
    """The rule for `NET` and `LOSS`, with next to no noise where it has any."""
    settings = {
        rules.private_sgd: {"noise_multiplier": 0.01},
        rules.forward_gradient: {"tangents": 16},
        rules.genetic_algorithm: {"std": 0.1},
        rules.pepita: {"projection_scale": 0.5},
    }
    return rule(NET, LOSS, **settings.get(rule, {}))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda r: r.__name__)
def test_every_rule_lowers_the_loss_and_is_reproducible(rule):
    data, made = blobs(), quiet(rule)
    runs = [
        fnn.fit(
            made,
            optax.sgd(1.0) if rule in SOLVERS else optax.adam(0.05),
            PARAMS,
            data,
            epochs=EPOCHS.get(rule, 10),
            batch_size=5,
            key=KEY,
            validation=data,
        )
        for _ in range(2)
    ]
    (params, history), (again, _) = runs
    assert history.loss[-1] < (1.0 if rule in FITS else 0.5) * history.loss[0]
    assert history.validation["accuracy"][-1] >= 0.8
    chex.assert_trees_all_equal(params, again)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda r: r.__name__)
def test_every_rule_ignores_padding_and_the_noiseless_give_the_gradient_of_backprop(x64, rule):
    x, t = blobs(6)
    x, params = jnp.asarray(x, jnp.float64), jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    made = rule(NET, LOSS)
    step = jax.jit(made.value_and_grad)
    value, grads, _ = step(params, made.init(KEY, params), x, t, weights)
    for content in (0.0, 1e3, *((np.nan, np.inf) if rule is rules.private_sgd else ())):
        again = step(params, made.init(KEY, params), x.at[4:].set(content), t, weights)
        assert error(wide((value, grads)), wide(again[:2])) <= 1e-12
    expected_value, expected = fnn.value_and_grad(NET, LOSS)(params, x[:4], t[:4])
    if rule not in OWN_VALUE:
        assert abs(float(value - expected_value)) <= 1e-12
    # the others are held against their definitions in test_private.py, test_feedback.py, ...
    if rule in GRADIENTS:
        assert error(wide(grads), wide(expected)) <= 1e-12


def test_per_example_sgd_takes_another_aggregate():
    x, t = blobs(5)

    def median(g, weights):
        return jnp.median(g, axis=0)

    rule = rules.per_example_sgd(NET, LOSS, aggregate=median)
    _, grads, _ = rule.value_and_grad(PARAMS, (), x, t)
    each = fnn.per_example.gradients(fnn.source(NET, LOSS))(PARAMS, x, t)
    chex.assert_trees_all_close(
        grads, jax.tree.map(lambda g: jnp.median(g, axis=0), each), rtol=1e-5
    )


def test_a_hundred_steps_and_a_second_fit_compile_once():
    x, t = blobs(40)
    inner = RULE.value_and_grad
    counted = fnn.Rule("counted", RULE.init, chex.assert_max_traces(n=1)(inner), RULE.predict, LOSS)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, 200))
    for _ in range(2):
        _, history = fnn.fit(counted, optimizer, PARAMS, (x, t), epochs=25, batch_size=10, key=KEY)
        assert history.step_loss.shape == (100,)
    chex.clear_trace_counter()


def test_a_schedule_counts_steps():
    x, t = blobs(8)
    # 2 steps an epoch: nothing moves for 2 epochs
    still = optax.sgd(lambda count: jnp.where(count < 4, 0.0, 0.5))
    _, history = fnn.fit(
        RULE, still, PARAMS, (x, t), epochs=3, batch_size=4, key=KEY, validation=(x, t)
    )
    start = fnn.evaluate(RULE, PARAMS, (x, t))["loss"]
    np.testing.assert_allclose(history.validation["loss"][:2], start, rtol=1e-6)
    assert abs(float(history.validation["loss"][2]) - start) > 1e-3


def test_the_callback_sees_every_epoch_and_may_stop():
    seen = []
    data = blobs()
    _, history = fnn.fit(
        RULE,
        optax.sgd(0.1),
        PARAMS,
        data,
        epochs=9,
        batch_size=8,
        key=KEY,
        validation=data,
        callback=lambda epoch, metrics: seen.append((epoch, sorted(metrics))) or epoch == 2,
    )
    assert seen == [(e, ["loss", "validation_accuracy", "validation_loss"]) for e in range(3)]
    assert history.loss.shape == history.validation["loss"].shape == (3,)


def test_a_loss_that_explodes_hands_back_the_last_finite_params():
    x, t = blobs()
    # 6 steps an epoch: step 7 is batch 1 of epoch 1
    optimizer = optax.sgd(lambda count: jnp.where(count == 7, jnp.inf, 0.1))
    with pytest.raises(fnn.NonFiniteError, match=r"step 7 \(epoch 1, batch 1\)") as caught:
        fnn.fit(RULE, optimizer, PARAMS, (x, t), epochs=3, batch_size=4, key=KEY)
    assert caught.value.step == 7
    assert caught.value.leaf == "params[0][0].w"
    assert len(caught.value.history.step_loss) == 8
    assert all(np.isfinite(leaf).all() for leaf in wide(caught.value.params))
    healthy = optax.sgd(lambda count: jnp.where(count < 7, 0.1, 0.0))
    params, _ = fnn.fit(RULE, healthy, PARAMS, (x, t), epochs=2, batch_size=4, key=KEY)
    assert error(wide(caught.value.params), wide(params)) < 1e-5


def test_many_nets_at_once_are_the_nets_one_by_one():
    x, t = blobs()
    keys, rates = jax.random.split(KEY, 3), jnp.array([0.01, 0.1, 0.3])
    params, history = fnn.fit_many(
        RULE, optax.sgd, NET.init, (x, t), epochs=3, batch_size=4, keys=keys, learning_rates=rates
    )
    assert history.loss.shape == (3, 3)
    assert history.step_loss.shape == (3, 18)
    for i in range(3):
        params_key, key = jax.random.split(keys[i])
        one, alone = fnn.fit(
            RULE,
            optax.sgd(float(rates[i])),
            jax.jit(NET.init)(params_key),
            (x, t),
            epochs=3,
            batch_size=4,
            key=key,
        )
        assert error([leaf[i] for leaf in wide(params)], wide(one)) < 1e-5
        np.testing.assert_allclose(history.loss[i], alone.loss, rtol=1e-4)


def test_evaluate_in_pieces_is_evaluate_at_once():
    x, t = blobs()
    weights = np.linspace(0, 1, len(x), dtype=np.float32)
    for data in ((x, t), (x, t, weights)):
        whole, pieces = (
            fnn.evaluate(RULE, PARAMS, data),
            fnn.evaluate(RULE, PARAMS, data, batch_size=5),
        )
        assert whole == pytest.approx(pieces, rel=1e-5)
    logits = NET.apply(PARAMS, x)
    assert whole["accuracy"] == pytest.approx(
        np.average(np.argmax(logits, -1) == t, weights=weights), rel=1e-5
    )
    regression = rules.backprop(NET, losses.l2_loss)
    assert set(fnn.evaluate(regression, PARAMS, (x, np.zeros((len(x), 3), np.float32)))) == {"loss"}


def test_a_batch_is_filled_up_with_weight_zero():
    x, t, w = padded((np.ones((2, 3)), np.ones(2), np.array([2.0, 3.0])), 4)
    assert x.shape == (4, 3)
    assert t.shape == (4,)
    assert w.tolist() == [2, 3, 0, 0]


def test_fit_keeps_bfloat16():
    x, t = blobs()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    trained, history = fnn.fit(
        RULE,
        optax.adam(0.05),
        params,
        (jnp.asarray(x, jnp.bfloat16), t),
        epochs=8,
        batch_size=6,
        key=KEY,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.bfloat16)}
    assert history.loss[-1] < 0.6 * history.loss[0]


@pytest.mark.parametrize("true", [True, np.bool_(True), jnp.bool_(True)])
def test_any_true_stops(true):
    _, history = fnn.fit(
        RULE,
        optax.sgd(0.1),
        PARAMS,
        blobs(),
        epochs=3,
        batch_size=8,
        key=KEY,
        callback=lambda e, m: true,
    )
    assert history.loss.shape == (1,)


def test_labels_are_checked_before_they_lose_bits():
    x, t = blobs()
    with pytest.raises(ValueError, match="labels in 0"):
        fnn.fit(
            RULE,
            optax.sgd(0.1),
            PARAMS,
            (x, t.astype(np.int64) + 2**32),
            epochs=1,
            batch_size=8,
            key=KEY,
        )


def test_a_batch_without_weight_is_legal_in_an_iterable():
    x, t = blobs(8)
    batches = [(x[:4], t[:4], np.ones(4, np.float32)), (x[4:], t[4:], np.zeros(4, np.float32))]
    params, history = fnn.fit(
        RULE, optax.sgd(0.1), PARAMS, batches, epochs=1, batch_size=4, key=KEY
    )
    alone, _ = fnn.fit(RULE, optax.sgd(0.1), PARAMS, batches[:1], epochs=1, batch_size=4, key=KEY)
    chex.assert_trees_all_close(params, alone, rtol=1e-6)
    assert history.step_loss[1] == 0
