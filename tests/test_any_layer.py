"""`fnn.as_layer`: an unmodified model is a layer, and rules train it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fnn
from fnn import losses, rules
from fnn.factors import keep, squared_norm

NET = fnn.mlp((5, 7, 6, 3), activation="tanh")


def apply(params, x):
    """`NET` of one example, in plain JAX; the params are a dict."""
    h = x
    for i in range(3):
        layer = params[f"layer {i}"]
        h = h @ layer["w"] + layer["b"]
        h = jnp.tanh(h) if i < 2 else h
    return h


def as_dict(params):
    """Params of `NET` as those of `apply`."""
    dense = jax.tree.leaves(params, is_leaf=lambda p: hasattr(p, "w"))
    return {f"layer {i}": {"w": p.w, "b": p.b} for i, p in enumerate(dense)}


def init(key):
    return as_dict(NET.init(key))


LAYER = fnn.as_layer(apply, init)
KEYS = jax.random.split(jax.random.key(0), 4)


def problem():
    x = jax.random.normal(KEYS[0], (6, 5))
    targets = jax.random.normal(KEYS[1], (6, 3))
    return x, targets


def gap(tree, other):
    """The norm-wise relative distance of two trees."""
    a, b = (np.asarray(ravel_pytree(t)[0]) for t in (tree, other))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_gradient_is_that_of_the_same_net(x64):
    x, targets = problem()
    params, feedback = (NET.init(key) for key in KEYS[2:])

    @jax.jit
    def both(params, feedback):
        ours = fnn.value_and_grad(LAYER, losses.l2_loss)(as_dict(params), x, targets)
        right = fnn.value_and_grad(NET, losses.l2_loss)(params, x, targets)
        results = [(ours, (right[0], as_dict(right[1])))]
        rules_of = partial(rules.feedback_alignment, loss=losses.l2_loss)
        _, g, _ = rules_of(LAYER).value_and_grad(as_dict(params), as_dict(feedback), x, targets)
        _, h, _ = rules_of(NET).value_and_grad(params, feedback, x, targets)
        return [*results, (g, as_dict(h))]

    for ours, right in both(params, feedback):
        assert gap(ours, right) < 1e-12


def test_backward_returns_what_reduce_makes_of_the_factors(x64):
    x, dy = problem()
    params = NET.init(KEYS[2])

    def parts(layer, params, reduce):
        _, residuals = layer.forward(params, x)
        return layer.backward(params, residuals, dy, reduce)

    for reduce in (squared_norm, keep):
        ours, dx = parts(LAYER, as_dict(params), reduce)
        right, dx_of_net = parts(NET, params, reduce)
        assert gap(ours, as_dict(right)) < 1e-12
        assert gap(dx, dx_of_net) < 1e-12


def test_check_layer_passes(x64):
    report = fnn.check_layer(LAYER, problem()[0], key=KEYS[0])
    assert report.passed, report


def test_a_layer_stands_in_serial_beside_others():
    net = fnn.serial(fnn.dense(4, 5), fnn.activations.relu, LAYER, fnn.dense(3, 2))
    x = jax.random.normal(KEYS[0], (6, 4))
    report = fnn.compare_gradients(net, losses.l2_loss, net.init(KEYS[1]), x, jnp.zeros((6, 2)))
    assert report.passed, report


def test_x_may_be_a_tree_with_keys_for_dropout(as_users_run):
    def dropped(w, x):
        keep = jax.random.bernoulli(x["key"], 0.5, x["image"].shape)
        return jnp.where(keep, x["image"], 0) @ w

    layer = fnn.as_layer(dropped)
    x = {"image": jnp.ones((4, 3)), "key": jax.random.split(KEYS[0], 4)}
    w = jax.random.normal(KEYS[1], (3, 2))
    targets = jnp.zeros((4, 2))
    weights = jnp.array([1.0, 1, 1, 0])
    value, grads = fnn.value_and_grad(layer, losses.l2_loss)(w, x, targets, weights)
    mean = fnn.mean_loss(layer, losses.l2_loss)
    right, expected = jax.value_and_grad(mean)(w, x, targets, weights)
    np.testing.assert_allclose(value, right, rtol=1e-6)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)
    _, residuals = layer.forward(w, x)
    _, dx = layer.backward(w, residuals, targets + 1)
    assert dx["key"] is None
    assert dx["image"].shape == (4, 3)


def test_a_function_that_needs_a_batch_axis_says_batched():
    def batched(w, x):
        return x.reshape(x.shape[0], -1) @ w

    layer = fnn.as_layer(batched, batched=True)
    x = jax.random.normal(KEYS[0], (4, 3, 2))
    w = jax.random.normal(KEYS[1], (6, 2))
    report = fnn.compare_gradients(layer, losses.l2_loss, w, x, jnp.zeros((4, 2)))
    assert report.passed, report


def test_fit_trains_it(as_users_run):
    x, targets = problem()
    rule = rules.feedback_alignment(LAYER, losses.l2_loss, feedback="kolen_pollack")
    _, history = fnn.fit(
        rule, optax.adam(1e-2), init(KEYS[2]), (x, targets), epochs=30, batch_size=3, key=KEYS[3]
    )
    assert history.loss[-1] < 0.5 * history.loss[0]


@pytest.mark.parametrize("wrong", ["params", "no_init", "tuple", "unbatched", "batched"])
def test_errors(wrong):
    x = jnp.ones((4, 3))
    if wrong == "params":
        with pytest.raises(ValueError, match=r"params\['layer 0'\]\['b'\].*another model"):
            LAYER.apply({**init(KEYS[0]), "layer 0": {"w": x, "b": x[0]}}, jnp.ones((4, 5)))
    if wrong == "no_init":
        with pytest.raises(TypeError, match="no `init`"):
            fnn.as_layer(apply).init(KEYS[0])
    if wrong == "tuple":
        with pytest.raises(TypeError, match="must return an array of real numbers, got tuple"):
            fnn.as_layer(lambda w, x: (x * w, x)).apply(jnp.ones(3), x)
    if wrong == "unbatched":
        with pytest.raises(ValueError, match="concatenated") as info:
            fnn.as_layer(lambda w, x: jnp.concatenate(x) * w).apply(jnp.ones(()), x)
        assert "batched=True" in info.value.__notes__[0]
    if wrong == "batched":
        with pytest.raises(ValueError, match="Leave out `batched=True`"):
            fnn.as_layer(lambda w, x: x.sum(0) @ w, batched=True).apply(jnp.ones((3, 2)), x)


def flax_pair(kind):
    """A Flax model as a layer, the same net of ours, its params as Flax has them, and an input."""
    nn = pytest.importorskip("flax.linen")
    if kind == "mlp":
        model = nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(3)])
        net = fnn.serial(fnn.dense(5, 7), fnn.activations.relu, fnn.dense(7, 3))
        names = {0: "layers_0", 2: "layers_2"}
        shape = (5,)
    else:
        model = nn.Sequential(
            [
                nn.Conv(4, (3, 3)),
                nn.tanh,
                lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
                lambda x: x.reshape(-1),
                nn.Dense(3),
            ]
        )
        layers = fnn.conv(2, 4, (3, 3)), fnn.activations.tanh, fnn.mean_pool((2, 2)), fnn.flatten()
        net = fnn.serial(*layers, fnn.dense(36, 3))
        names = {0: "layers_0", 4: "layers_4"}
        shape = (6, 6, 2)

    def as_flax(params):
        found = {name: {"kernel": params[i].w, "bias": params[i].b} for i, name in names.items()}
        return {"params": found}

    layer = fnn.as_layer(model.apply, lambda key: as_flax(net.init(key)))
    return layer, net, as_flax, shape


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_feedback_alignment_of_a_flax_model_is_that_of_our_net(kind, x64, as_users_run):
    layer, net, as_flax, shape = flax_pair(kind)
    x = jax.random.normal(KEYS[0], (4, *shape))
    targets = jax.random.normal(KEYS[1], (4, 3))
    params, feedback = (net.init(key) for key in KEYS[2:])

    @jax.jit
    def both(params, feedback):
        ours = rules.feedback_alignment(layer, losses.l2_loss)
        right = rules.feedback_alignment(net, losses.l2_loss)
        with jax.numpy_rank_promotion("allow"):
            one = ours.value_and_grad(as_flax(params), as_flax(feedback), x, targets)[:2]
        value, grads, _ = right.value_and_grad(params, feedback, x, targets)
        return one, (value, as_flax(grads))

    ours, right = both(params, feedback)
    assert gap(ours, right) < 1e-12
