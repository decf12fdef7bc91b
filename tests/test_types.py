"""Layers, losses and rules as values: equality by recipe, and what a type checker sees."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import optax
import pytest

import fnn
from fnn import losses

LABELS = losses.softmax_cross_entropy_with_integer_labels
BUILT = {
    "dense": lambda: fnn.dense(3, 2),
    "layer_norm": lambda: fnn.layer_norm(3, epsilon=1e-3),
    "rms_norm": lambda: fnn.rms_norm(3),
    "embedding": lambda: fnn.embedding(3, 2),
    "serial": lambda: fnn.serial(fnn.dense(3, 3), fnn.activations.relu),
    "repeat": lambda: fnn.repeat(fnn.dense(3, 3), 2),
    "iterate": lambda: fnn.iterate(fnn.dense(3, 3), 2),
    "residual": lambda: fnn.residual(fnn.dense(3, 3)),
    "mlp": lambda: fnn.mlp([3, 4, 2], "tanh"),
    "an activation with a setting": lambda: fnn.activations.leaky_relu(negative_slope=0.2),
    "a loss with a setting": lambda: losses.huber_loss(delta=2.0),
    "a loss of optax's": lambda: losses.from_function(optax.l2_loss),
    "a rule": lambda: fnn.rules.backprop(fnn.mlp((3, 2)), losses.l2_loss),
    "a rule with settings": lambda: fnn.rules.private_sgd(
        fnn.mlp((3, 2)), losses.l2_loss, max_norm=1.0, noise_multiplier=1.0, batch_size=8
    ),
}
OTHERS = [
    (fnn.dense(3, 2), fnn.dense(2, 3)),
    (fnn.dense(3, 2), fnn.dense(3, 2, bias_init=None)),
    (fnn.layer_norm(3), fnn.rms_norm(3)),
    (fnn.mlp((3, 4, 2), "tanh"), fnn.mlp((3, 4, 2), "relu")),
    (losses.huber_loss(delta=2.0), losses.huber_loss),
    (fnn.repeat(fnn.dense(3, 3), 2), fnn.iterate(fnn.dense(3, 3), 2)),
]


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_twice_is_equal_and_hashes_alike(name):
    one, two = BUILT[name](), BUILT[name]()
    assert one is not two
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.parametrize(("one", "two"), OTHERS)
def test_what_is_built_otherwise_is_not_equal(one, two):
    assert one != two


def test_a_net_that_is_built_again_does_not_compile_again():
    traced = []

    def loss_of(net, params, x, t):
        traced.append(net)
        return fnn.value_and_grad(net, losses.l2_loss)(params, x, t)[0]

    f = jax.jit(loss_of, static_argnums=0)
    params = fnn.mlp((3, 4, 2)).init(jax.random.key(0))
    for _ in range(3):
        f(fnn.mlp((3, 4, 2)), params, jnp.ones((5, 3)), jnp.ones((5, 2)))
    assert len(traced) == 1
    f(fnn.mlp((3, 4, 2), "tanh"), params, jnp.ones((5, 3)), jnp.ones((5, 2)))
    assert len(traced) == 2


SCRIPT = """
import jax
import jax.numpy as jnp
import fnn

net = fnn.mlp((3, 4, 2), "tanh")
loss = fnn.losses.softmax_cross_entropy_with_integer_labels
x, t = jnp.ones((5, 3)), jnp.zeros(5, int)
params = net.init(jax.random.key(0))
layer = fnn.dense(3, 2)
reveal_type(layer.init(jax.random.key(0)).w)
reveal_type(layer.init(jax.random.key(0)))
reveal_type(fnn.value_and_grad(layer, loss)(layer.init(jax.random.key(0)), x, t)[1])
fnn.value_and_grad(net, loss)(params, x, t)
fnn.per_example.norms(fnn.source(net, loss))(params, x, t)
fnn.value_and_grad(layer, loss)(x, t, params)  # error: x is no Dense
fnn.value_and_grad(net)  # error: no loss
fnn.mlp((3, 2), "tahn")  # error: no activation of that name
fnn.per_example.clipped_gradient(fnn.source(net, loss), 1.0, reduction="total")  # error
net.aplly(params, x)  # error
"""


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright")
def test_a_type_checker_finds_the_errors_of_a_users_script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = subprocess.run(["pyright", str(file)], capture_output=True, text=True)
    lines = SCRIPT.splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if "# error" in line]
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if " error: " in line}
    assert sorted(found) == wrong, done.stdout
    types = [line for line in done.stdout.splitlines() if "Type of" in line]
    assert '"Dense"' in types[1]
    assert '"Dense"' in types[2]
    assert "Unknown" not in done.stdout


def test_completion_shows_public_names_alone():
    names = dir(fnn)
    assert {"mlp", "source", "losses", "per_example", "key"} <= set(names)
    assert not {"train", "backprop", "_validate", "verify"} & set(names)
