"""`fit` on a mesh is `fit`; what it saved goes on there bit for bit, and elsewhere to rounding."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import error, wide
from test_checkpoint import raw

import fnn
from fnn import losses, rules
from fnn.checkpoint import Checkpointer, steps
from fnn.sharding import PLANS, fully_sharded, make_mesh, replicated, tensor_parallel
from fnn.training import own_batches

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="8 devices: JAX_NUM_CPU_DEVICES=8")
NET = fnn.mlp((6, 16, 8, 3), "tanh")
LOSS = losses.softmax_cross_entropy_with_integer_labels
RULE = rules.backprop(NET, LOSS)
PARAMS = jax.jit(NET.init)(jax.random.key(0))
ADAM = optax.adam(0.01)
KEY = jax.random.key(3)


def data(n=45):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 3, n).astype(np.int32)


def norm(params, state, x, targets, weights):
    w = jnp.ones(len(x)) if weights is None else weights
    return jnp.abs(params[1][0].b).sum(), (w[:, None] * x).sum()  # rows that fill up have weight 0


def train(mesh=None, plan=None, batches=None, folder=None, epochs=2, rule=RULE, optimizer=ADAM):
    checkpoint = None if folder is None else Checkpointer(folder, keep=100, wait=True)
    return fnn.fit(
        rule,
        optimizer,
        PARAMS,
        data() if batches is None else batches,
        epochs=epochs,
        batch_size=10,
        key=KEY,
        validation=data(7),
        record=norm,
        record_every=3,
        checkpoint=checkpoint,
        mesh=mesh,
        plan=plan,
    )


@pytest.mark.parametrize("make", PLANS, ids=lambda plan: plan.__name__)
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)], ids=str)
def test_fit_on_a_mesh_is_fit(make, shape):
    """One epoch of five batches of 10, which 8 and 4 devices do not divide.

    The last has 5 examples.
    """
    mesh = make_mesh(data=shape[0], model=shape[1])
    # Adam's division magnifies rounding where gradients are near 0
    plan, optimizer = make(mesh, PARAMS), optax.sgd(0.1, momentum=0.9)
    for batches in (None, [tuple(part[i : i + 10] for part in data()) for i in range(0, 45, 10)]):
        expected, history = train(batches=batches, epochs=1, optimizer=optimizer)
        params, found = train(mesh, plan, batches, epochs=1, optimizer=optimizer)
        assert error(wide(params), wide(expected)) < 1e-6
        assert error(wide(found), wide(history)) < 1e-6
        for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(plan), strict=True):
            assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim)


@pytest.mark.parametrize("make", PLANS, ids=lambda plan: plan.__name__)
def test_a_checkpoint_goes_on_on_the_same_mesh_bit_for_bit(tmp_path, make):
    mesh, rule = make_mesh(data=4, model=2), rules.node_perturbation(NET, LOSS)
    plan = make(mesh, PARAMS)
    expected = train(mesh, plan, folder=tmp_path / "whole", rule=rule)
    train(mesh, plan, folder=tmp_path / "run", epochs=1, rule=rule)
    again = train(mesh, plan, folder=tmp_path / "run", rule=rule)
    assert [raw(a) for a in jax.tree.leaves(again)] == [raw(b) for b in jax.tree.leaves(expected)]
    assert steps(tmp_path / "run") == [5, 10]


def test_a_checkpoint_goes_on_elsewhere_to_rounding(tmp_path):
    """An epoch on 8 devices, and the next on 2, on 1, and on 8 by another plan."""
    mesh, optimizer = make_mesh(data=4, model=2), optax.sgd(0.1, momentum=0.9)
    train(
        mesh, tensor_parallel(mesh, PARAMS), folder=tmp_path / "run", epochs=1, optimizer=optimizer
    )
    expected, history = train(optimizer=optimizer)
    two = make_mesh(data=2, model=1)
    for i, (there, plan) in enumerate(
        [(None, None), (two, fully_sharded(two, PARAMS)), (mesh, replicated(mesh, PARAMS))]
    ):
        shutil.copytree(tmp_path / "run", tmp_path / str(i))
        params, found = train(there, plan, folder=tmp_path / str(i), optimizer=optimizer)
        assert error(wide(params), wide(expected)) < 1e-6
        assert error(wide(found), wide(history)) < 1e-6


def test_a_run_over_arrays_goes_on_over_own_batches(tmp_path):
    """As one process goes on with what several began."""
    expected, _ = train(folder=tmp_path / "whole")
    train(folder=tmp_path / "run", epochs=1)
    params, _ = train(folder=tmp_path / "run", batches=own_batches(data(), 10, KEY, 2))
    assert error(wide(params), wide(expected)) < 1e-6


def test_own_batches_are_those_of_arrays():
    weights = np.linspace(0, 1, 45, dtype=np.float32)
    for given in (data(), (*data(), weights)):
        expected, history = train(batches=given)
        params, found = train(batches=own_batches(given, 10, KEY, 2))
        assert error(wide(params), wide(expected)) < 1e-6
        assert error(wide(found), wide(history)) < 1e-6


def test_a_loss_that_explodes_on_a_mesh_hands_back_the_last_finite_params():
    mesh = make_mesh(data=4, model=2)
    optimizer = optax.sgd(lambda count: jnp.where(count == 7, jnp.inf, 0.1))
    for batches in (None, own_batches(data(), 10, KEY, 2)):
        with pytest.raises(fnn.NonFiniteError, match=r"step 7 \(epoch 1, batch 2\)") as caught:
            train(mesh, tensor_parallel(mesh, PARAMS), batches, optimizer=optimizer)
        assert all(np.isfinite(leaf).all() for leaf in wide(caught.value.params))


def test_a_plan_without_a_mesh_is_an_error():
    with pytest.raises(
        ValueError, match="`plan` says where params lie on a mesh, but `mesh` is None"
    ):
        train(plan=replicated(make_mesh(), PARAMS))
