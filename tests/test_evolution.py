"""Evolution: every update is the paper's, written out in NumPy, for the noise that was drawn.

And no member can poison a generation.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import error, wide

import fnn
from experiments import evolution as experiment
from fnn import losses
from fnn.nets.blocks import blocks
from fnn.rules import evolution
from fnn.rules.evolution import evolution_strategies, genetic_algorithm, snes

RULES = (evolution_strategies, snes, genetic_algorithm)
KEY = jax.random.key(5)
LOSS = losses.squared_error
NET = fnn.mlp((3, 4, 2), "tanh")
X = np.linspace(-1, 1, 15).reshape(5, 3) ** 2
T = np.cos(np.arange(10.0)).reshape(5, 2)


def params_of(net, dtype=jnp.float64):
    """Parameters that are the same numbers in whichever way a net is written."""
    empty, rng = (
        jax.tree.map(lambda leaf: np.empty(leaf.shape), jax.eval_shape(net.init, KEY)),
        np.random.default_rng(1),
    )
    return blocks(net).join(
        jax.tree.map(
            lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype),
            blocks(net).split(empty),
        )
    )


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in wide(tree)])


def rows(tree):
    """Every member as a vector, `[members, d]`."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide(tree)], 1)


def loss_at(theta, weights=None):
    """The mean loss of `NET` at a vector of parameters, written out."""
    w1, b1, w2, b2 = theta[:12].reshape(3, 4), theta[12:16], theta[16:24].reshape(4, 2), theta[24:]
    each = ((np.tanh(X @ w1 + b1) @ w2 + b2 - T) ** 2).sum(1)
    return np.average(each, weights=weights)


def ranks(values):
    """Ranks 0 ... n - 1; equals share the mean of theirs; what is not finite is the worst."""
    values = [v if np.isfinite(v) else np.inf for v in values]
    return np.array(
        [sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]
    )


def utilities(values):
    """The paper's, by loops; equals share the mean of theirs."""
    n = len(values)
    raw = [max(0, math.log(n / 2 + 1) - math.log(k)) for k in range(1, n + 1)]
    by_rank = [r / sum(raw) - 1 / n for r in raw]
    order = sorted(range(n), key=lambda i: values[i] if np.isfinite(values[i]) else np.inf)
    place = {i: k for k, i in enumerate(order)}
    same = [
        [
            j
            for j in range(n)
            if values[j] == values[i] or not (np.isfinite(values[i]) or np.isfinite(values[j]))
        ]
        for i in range(n)
    ]
    return np.array([np.mean([by_rank[place[j]] for j in group]) for group in same])


def members_of(rule, params, state):
    """`[members, d]`."""
    return rows(jax.jit(rule.members)(params, state))


def noise_of(n, params):
    """E of an evolution strategy.

    With std 1 its first members, those with plus, are the params and a row of E.
    """
    members = members_of(evolution_strategies(NET, LOSS, population=n, std=1.0), params, KEY)
    np.testing.assert_allclose(
        members[: n // 2] + members[n // 2 :], 2 * np.stack([flat(params)] * (n // 2)), atol=1e-14
    )
    return members[: n // 2] - flat(params)


# ---------------------------------------------------------------- shaping

VALUES = (
    [3.0, 1.0],
    [1.0, 1.0],
    [5.0, 2.0, 2.0, 7.0, 2.0, 5.0],
    [np.nan, 1.0, np.inf, 3.0, -np.inf, 0.5],
    [np.nan] * 6,
)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_members_are_shaped_by_rank_and_equals_share(x64, values):
    n = len(values)
    shaped = jax.jit(
        lambda v: (
            evolution._by_rank(v, np.linspace(-0.5, 0.5, n)),
            evolution._by_rank(v, evolution._utilities(n)),
        )
    )
    by_rank, by_utility = shaped(np.where(np.isfinite(values), values, np.inf))
    np.testing.assert_allclose(by_rank, ranks(values) / (n - 1) - 0.5, atol=1e-15)
    np.testing.assert_allclose(by_utility, utilities(values), atol=1e-15)


def test_utilities_are_those_of_the_paper():
    u = evolution._utilities(4)  # log 3 - log k for k = 1, 2; log 3 - log 3 = 0; and 0
    np.testing.assert_allclose(
        u, np.array([math.log(3), math.log(1.5), 0, 0]) / math.log(4.5) - 0.25, atol=1e-15
    )
    assert abs(evolution._utilities(101).sum()) < 1e-14


# ---------------------------------------------------------------- evolution strategies


@pytest.mark.parametrize(
    ("fitness", "chunk"), [("centred_ranks", None), ("centred_ranks", 4), ("raw", 2), ("raw", 1000)]
)
def test_the_estimate_is_that_of_the_paper_for_the_noise_drawn(x64, fitness, chunk):
    params, n, std = params_of(NET), 10, 0.3
    rule = evolution_strategies(NET, LOSS, population=n, std=std, fitness=fitness, chunk=chunk)
    e = noise_of(n, params)
    weights = np.array([1.0, 2.0, 0.0, 1.0, 0.5])
    theta = flat(params)
    signed = np.concatenate([e, -e])
    values = [loss_at(theta + std * v, weights) for v in signed]
    s = np.array(values) if fitness == "raw" else ranks(values) / (n - 1) - 0.5
    expected = sum(s[i] * signed[i] for i in range(n)) / (n * std)
    value, grads, state = jax.jit(rule.value_and_grad)(
        params, rule.init(KEY, params), X, T, weights
    )
    np.testing.assert_allclose(flat(grads), expected, rtol=0, atol=1e-12)
    assert abs(float(value) - loss_at(theta, weights)) < 1e-14
    assert jax.random.key_data(state).tolist() != jax.random.key_data(KEY).tolist()


def test_raw_fitness_with_a_small_std_is_the_forward_gradient(x64):
    params, n = params_of(NET), 12
    e = noise_of(n, params)
    theta, tree, _ = evolution._flattened(blocks(NET), params)
    slope = jax.vmap(
        lambda v: jax.jvp(lambda p: fnn.mean_loss(NET, LOSS)(tree(p), X, T), (theta,), (v,))[1]
    )
    expected = np.asarray(jax.jit(slope)(jnp.asarray(e))) @ e / len(e)
    for std in (1e-4, 1e-5, 1e-6):
        rule = evolution_strategies(NET, LOSS, population=n, std=std, fitness="raw")
        found = flat(jax.jit(rule.value_and_grad)(params, KEY, X, T)[1])
        # the third derivative, and rounding: 3e-9 at best
        assert np.abs(found - expected).max() < 20 * std**2 + 3e-15 / std


@pytest.mark.parametrize("std", [1.0, 1e-2])
def test_raw_fitness_of_a_quadratic_loss_is_the_forward_gradient_whatever_the_std(x64, std):
    """Both signs of a step differ by the slope exactly where there is no third derivative."""
    net, loss, n = fnn.dense(3, 2), losses.l2_loss, 10
    params = net.init(KEY)
    x, t = np.random.default_rng(0).normal(size=(2, 7, 3))
    rule = evolution_strategies(net, loss, population=n, std=std, fitness="raw")
    e = (members_of(rule, params, KEY)[: n // 2] - flat(params)) / std
    gradient = flat(fnn.value_and_grad(net, loss)(params, x, t[:, :2])[1])
    found = flat(rule.value_and_grad(params, KEY, x, t[:, :2])[1])
    np.testing.assert_allclose(found, e @ gradient @ e / len(e), rtol=0, atol=1e-12)


def test_forward_gradients_of_the_noise_have_the_cosine_that_is_claimed(x64):
    params, m, d = params_of(NET), 10, 26
    noise = noise_of(2 * 400 * m, params).reshape(400, m, d)
    gradient = np.cos(np.arange(d))
    g = np.stack([e.T @ (e @ gradient) / m for e in noise])
    share = ((g @ gradient) ** 2 / (g**2).sum(1)).mean() / (gradient @ gradient)
    assert share == pytest.approx(m / (m + d + 1), rel=0.1)
    # right on average: sqrt((d + 1) / (400 m)) is 0.08
    assert np.linalg.norm(g.mean(0) - gradient) < 0.15 * np.linalg.norm(gradient)
    # 0.016 each
    assert abs(np.corrcoef(noise.reshape(-1, d), rowvar=False) - np.eye(d)).max() < 0.08


# ---------------------------------------------------------------- snes


@pytest.mark.parametrize(("population", "chunk"), [(None, 4), (2, None)])
def test_snes_updates_mean_and_std_as_the_paper(x64, population, chunk):
    params, optimizer = params_of(NET), optax.sgd(1.0)
    rule = snes(NET, LOSS, population=population, std=0.2, chunk=chunk)
    state, update, members = (
        rule.init(KEY, params),
        jax.jit(rule.value_and_grad),
        jax.jit(rule.members),
    )
    mu, sigma = flat(params), np.full(26, 0.2)
    for _ in range(3):
        z = rows(members(params, state))
        assert len(z) == (4 + math.floor(3 * math.log(26)) if population is None else population)
        s = (z - mu) / sigma
        value, grads, state = update(params, state, X, T)
        assert abs(float(value) - loss_at(mu)) < 1e-13
        u = utilities([loss_at(row) for row in z])
        for_mu = sum(u[k] * s[k] for k in range(len(z)))
        for_sigma = sum(u[k] * (s[k] ** 2 - 1) for k in range(len(z)))
        mu = mu + sigma * for_mu
        sigma = sigma * np.exp((3 + math.log(26)) / (5 * math.sqrt(26)) / 2 * for_sigma)
        params = optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0])
        np.testing.assert_allclose(flat(params), mu, rtol=0, atol=1e-12)
        np.testing.assert_allclose(flat(state.std), sigma, rtol=0, atol=1e-12)
    assert sigma.std() > 0.003


# ---------------------------------------------------------------- genetic algorithm


@pytest.mark.parametrize(("parents", "chunk", "kind"), [(1, None, "threefry2x32"), (3, 5, "rbg")])
def test_the_best_children_become_parents_and_the_best_of_all_the_params(x64, parents, chunk, kind):
    """JAX's rbg keys give other numbers under `vmap`, and children are drawn twice, in other
    company."""
    params, optimizer = params_of(NET), optax.sgd(1.0)
    rule = genetic_algorithm(NET, LOSS, parents=parents, children=8, std=0.2, chunk=chunk)
    state = rule.init(jax.random.key(5, impl=kind), params)
    update, members = jax.jit(rule.value_and_grad), jax.jit(rule.members)
    np.testing.assert_array_equal(rows(state.parents), np.broadcast_to(flat(params), (parents, 26)))
    for _ in range(3):
        children = rows(members(params, state))
        values = [loss_at(child) for child in children]
        value, grads, state = update(params, state, X, T)
        chosen = sorted(range(8), key=lambda i: values[i])[:parents]
        np.testing.assert_allclose(rows(state.parents), children[chosen], rtol=0, atol=1e-14)
        assert abs(float(value) - min(values)) < 1e-13
        params = optax.apply_updates(params, optimizer.update(grads, optimizer.init(params))[0])
        np.testing.assert_allclose(flat(params), children[chosen[0]], rtol=0, atol=1e-14)


def test_children_are_mutations_of_parents_chosen_evenly(x64):
    rule = genetic_algorithm(NET, LOSS, parents=4, children=2000, std=1e-3)
    params = params_of(NET)
    parents = jax.tree.map(lambda p: p[None] + jnp.arange(4.0).reshape(4, *(1,) * p.ndim), params)
    children = members_of(rule, params, rule.init(KEY, params)._replace(parents=parents))
    old = rows(parents)
    nearest = np.abs(children[:, None, 0] - old[None, :, 0]).argmin(1)
    assert np.bincount(nearest).min() > 420  # 500 expected; four standard deviations are 77
    mutations = (children - old[nearest]) / 1e-3
    assert abs(mutations.mean()) < 0.02
    assert mutations.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(mutations, rowvar=False) - np.eye(26)).max() < 0.12


# ---------------------------------------------------------------- all three

SMALL = {
    evolution_strategies: {"population": 6},
    snes: {"population": 6},
    genetic_algorithm: {"parents": 2, "children": 6},
}


BROKEN = fnn.Loss(  # NaN where the output is above the target
    "broken",
    lambda outputs, targets: jnp.where(outputs > targets, jnp.nan, jnp.exp(outputs))[:, 0],
    lambda outputs, targets: outputs,
)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [*SMALL.items(), (evolution_strategies, {"population": 6, "fitness": "raw"})],
    ids=lambda a: getattr(a, "__name__", str(a)),
)
def test_a_member_that_is_not_finite_ranks_last_and_poisons_nothing(x64, rule, settings):
    """By a net of one weight, at 0, and one example of 1, the outputs are the members."""
    params, std = fnn.nets.layers.Dense(jnp.zeros((1, 1)), None), 0.5
    made = rule(fnn.dense(1, 1, bias_init=None), BROKEN, std=std, **settings)
    state, step = made.init(KEY, params), jax.jit(made.value_and_grad)
    z = members_of(made, params, state)[:, 0]
    for limit, broken in ((np.sort(z)[-2], 1), (np.median(z), 3), (-1e3, 6)):
        values = np.where(z > limit, np.nan, np.exp(z))
        assert np.isnan(values).sum() == broken
        _, grads, after = step(params, state, jnp.ones((1, 1)), jnp.full((1, 1), limit))
        order = sorted(range(6), key=lambda i: np.inf if np.isnan(values[i]) else values[i])
        pairs = [k for k in range(3) if np.isfinite(values[k] + values[k + 3])]
        if rule is genetic_algorithm:
            expected = -z[order[0]]
            np.testing.assert_allclose(rows(after.parents)[:, 0], z[order[:2]], atol=1e-14)
        elif rule is snes:
            expected = -utilities(values) @ z
            assert np.isfinite(flat(after.std)).all()
        elif "fitness" in settings:
            expected = sum((values[k] - values[k + 3]) * z[k] / std for k in pairs) / max(
                2 * len(pairs) * std, 1
            )
        else:
            expected = (ranks(values) / 5 - 0.5) @ z / std / (6 * std)
        assert float(grads.w[0, 0]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("rule", [evolution_strategies, snes])
def test_a_generation_without_differences_moves_nothing(x64, rule):
    flat_loss = fnn.Loss(
        "flat",
        lambda outputs, targets: jnp.ones(outputs.shape[:1]),
        lambda outputs, targets: jnp.zeros_like(outputs),
    )
    made, params = rule(NET, flat_loss, std=0.1, population=34), params_of(NET)
    _, grads, state = jax.jit(made.value_and_grad)(params, made.init(KEY, params), X, T)
    assert np.abs(flat(grads)).max() < 1e-16
    if rule is snes:
        np.testing.assert_allclose(flat(state.std), 0.1, rtol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_padding_counts_nowhere_and_equal_weights_are_none(x64, rule):
    made, params = rule(NET, LOSS, std=0.1, **SMALL[rule]), params_of(NET)
    step, state = jax.jit(made.value_and_grad), made.init(KEY, params)
    x, t = np.concatenate([X, X[:2]]), np.concatenate([T, T[:2]])
    equal = wide(step(params, state, x, t, np.full(7, 0.3))[:2])
    if rule is evolution_strategies:
        assert error(equal, wide(step(params, state, x, t)[:2])) < 1e-12
    # a loss with weights is held against its definition above
    present = (np.arange(7) < 5).astype(float)
    expected = wide(step(params, state, x, t, present)[:2])
    assert error(expected, equal) > 1e-3
    for content in (0.0, 1e3):
        x[5:] = t[5:] = content
        assert error(wide(step(params, state, x, t, present)[:2]), expected) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_every_way_to_write_a_net_evolves_alike(x64, rule):
    tanh, dense = fnn.activations.tanh, fnn.dense
    nets = [
        fnn.mlp((3, 3, 3, 2), "tanh"),
        fnn.serial(fnn.repeat(fnn.serial(dense(3, 3), tanh), 2), dense(3, 2)),
        fnn.serial(dense(3, 3), tanh, dense(3, 3), tanh, dense(3, 2)),
    ]
    found = []
    for net in nets[: 3 if rule is evolution_strategies else 2]:
        made, params = rule(net, LOSS, std=0.1, **SMALL[rule]), params_of(net)
        value, grads, state = jax.jit(made.value_and_grad)(params, made.init(KEY, params), X, T)
        split, chosen = blocks(net).split, ()
        if rule is not evolution_strategies:
            chosen = split(state.std) if rule is snes else jax.vmap(split)(state.parents)
        found.append(wide((value, split(grads), chosen)))
    assert max(error(other, found[0]) for other in found[1:]) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("rule", RULES)
def test_the_dtype_is_kept(x64, rule, dtype):
    made, params = rule(NET, LOSS, std=0.1, **SMALL[rule]), params_of(NET, dtype)
    state = made.init(KEY, params)
    x, t = jnp.asarray(X, dtype), jnp.asarray(T, dtype)
    value, grads, after = jax.eval_shape(made.value_and_grad, params, state, x, t)
    for leaf in jax.tree.leaves((value, grads, jax.eval_shape(made.members, params, state))):
        assert leaf.dtype == dtype
        assert not leaf.weak_type
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), jax.eval_shape(lambda: state)
    )
    if rule is snes:
        assert {leaf.dtype for leaf in jax.tree.leaves(after.std)} == {
            jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
        }


@pytest.mark.parametrize("rule", RULES[:2])
def test_float32_gives_what_float64_gives_for_the_same_members(x64, rule):
    """One example, which the members get wrong by amounts that are not near to each other."""
    net, x = fnn.dense(1, 1), jnp.ones((1, 1))
    narrow = fnn.nets.layers.Dense(jnp.ones((1, 1), jnp.float32), jnp.zeros(1, jnp.float32))
    made = rule(net, LOSS, std=0.5, **SMALL[rule])
    state = made.init(KEY, narrow)
    z = members_of(made, narrow, state)
    values = (z.sum(1) ** 2).tolist()
    _, grads, _ = jax.jit(made.value_and_grad)(
        narrow, state, x.astype(jnp.float32), jnp.zeros((1, 1), jnp.float32)
    )
    if rule is evolution_strategies:
        expected = ((ranks(values) / 5 - 0.5) @ (z - [1, 0])) / 0.5 / (6 * 0.5)
    else:
        expected = -utilities(values) @ (z - [1, 0])
    np.testing.assert_allclose(flat(grads), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [genetic_algorithm])
def test_many_nets_at_once_evolve_as_each_alone(x64, rule):
    made = rule(NET, LOSS, std=0.1, **SMALL[rule])
    keys, params = jax.random.split(KEY, 2), params_of(NET)
    many = jax.tree.map(lambda p: jnp.stack([p, p + 0.1]), params)
    states = jax.vmap(made.init)(keys, many)
    found = jax.jit(jax.vmap(made.value_and_grad, (0, 0, None, None)))(many, states, X, T)
    step = jax.jit(made.value_and_grad)
    for i in range(2):
        alone = jax.tree.map(lambda p, i=i: p[i], many)
        one = step(alone, made.init(keys[i], alone), X, T)
        assert error([leaf[i] for leaf in wide(found[:2])], wide(one[:2])) < 1e-12


@pytest.mark.parametrize(
    ("made", "optimizer"),
    [
        (evolution_strategies(NET, LOSS, population=16, std=0.1), optax.adam(0.05)),
        (genetic_algorithm(NET, LOSS, parents=2, children=12, std=0.1), optax.sgd(1.0)),
    ],
    ids=["evolution", "genetic"],
)
def test_fit_lowers_the_loss_and_repeats_itself(made, optimizer):
    data, params = (X.astype(np.float32), T.astype(np.float32)), params_of(NET, jnp.float32)
    runs = [
        fnn.fit(made, optimizer, params, data, epochs=60, batch_size=5, key=KEY) for _ in range(2)
    ]
    assert loss_at(flat(runs[0][0])) < 0.4 * loss_at(flat(params))
    np.testing.assert_array_equal(flat(runs[0][0]), flat(runs[1][0]))
    assert len(set(np.asarray(runs[0][1].loss).tolist())) > 50  # noise is new in every step


ONE = fnn.mlp((1, 1, 1), "tanh")
TABLE = fnn.serial(fnn.embedding(3, 2), fnn.dense(2, 1))


@pytest.mark.parametrize(
    ("rule", "net"), [*((rule, ONE) for rule in RULES), (evolution_strategies, TABLE)]
)
def test_one_unit_and_one_example_are_enough(rule, net):
    x = np.array([1]) if net is TABLE else np.ones((1, 1), np.float32)
    params = params_of(net, jnp.float32)
    made = rule(net, LOSS, std=0.1, **SMALL[rule])
    value, grads, _ = jax.jit(made.value_and_grad)(
        params, made.init(KEY, params), x, np.ones((1, 1), np.float32)
    )
    assert np.isfinite(flat((value, grads))).all()
    assert np.abs(flat(grads)).max() > 0
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


BAD = [
    (
        evolution_strategies,
        {"population": 7},
        ValueError,
        "`population` must be an even number, .* got 7. Pass 8",
    ),
    (
        evolution_strategies,
        {"population": 0},
        ValueError,
        "`population` must be a whole number above 0, got 0",
    ),
    (
        evolution_strategies,
        {"population": 4.0},
        TypeError,
        "`population` must be a whole number above 0, got 4.0",
    ),
    (
        evolution_strategies,
        {"std": 0.0},
        ValueError,
        "`std` must be a finite number above 0, got 0.0",
    ),
    (
        evolution_strategies,
        {"fitness": "centered_ranks"},
        ValueError,
        "Unknown fitness .* Did you mean 'centred_ranks'",
    ),
    (
        evolution_strategies,
        {"chunk": 0},
        ValueError,
        "`chunk` must be a whole number above 0, got 0",
    ),
    (snes, {"population": 1}, ValueError, "`population` must be at least 2, .* got 1. Pass 2"),
    (snes, {"std": -1.0}, ValueError, "`std` must be a finite number above 0, got -1.0"),
    (snes, {"std": math.nan}, ValueError, "`std` must be a finite number above 0, got nan"),
    (snes, {"chunk": 2.5}, TypeError, "`chunk` must be a whole number above 0, got 2.5"),
    (
        genetic_algorithm,
        {"parents": 9, "children": 8},
        ValueError,
        "`parents` must be at most `children`, .* got 9 of 8",
    ),
    (
        genetic_algorithm,
        {"parents": 0},
        ValueError,
        "`parents` must be a whole number above 0, got 0",
    ),
    (
        genetic_algorithm,
        {"parents": 1, "children": 1},
        ValueError,
        "`children` must be at least 2, .* got 1",
    ),
    (
        genetic_algorithm,
        {"std": math.inf},
        ValueError,
        "`std` must be a finite number above 0, got inf",
    ),
]


@pytest.mark.parametrize(
    ("rule", "settings", "kind", "message"), BAD, ids=[f"{r.__name__} {s}" for r, s, _, _ in BAD]
)
def test_a_bad_setting_is_an_error_that_names_it(rule, settings, kind, message):
    with pytest.raises(kind, match=message):
        rule(NET, LOSS, **settings)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_net_no_loss_or_has_no_parameters_is_an_error_that_says_so(rule):
    with pytest.raises(TypeError, match="`net` must be a Layer"):
        rule("relu", LOSS)
    with pytest.raises(TypeError, match="`loss` must be a Loss"):
        rule(NET, "l2_loss")
    made, x = rule(fnn.activations.tanh, LOSS), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="`params` has no arrays, so nothing can evolve"):
        made.value_and_grad((), made.init(KEY, ()), x, x)
    made = rule(NET, LOSS)
    with pytest.raises(ValueError, match="Params of another net"):
        made.value_and_grad(
            params_of(fnn.mlp((3, 2)), jnp.float32),
            made.init(KEY, params_of(NET, jnp.float32)),
            X,
            T,
        )


# ---------------------------------------------------------------- the experiment


def test_the_plane_is_a_net_and_its_loss_has_its_gradient(x64):
    net, loss = experiment.problem()
    points = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)) * 2)
    np.testing.assert_allclose(
        experiment.ripples_grad(points),
        jax.grad(lambda p: experiment.ripples(p).sum())(points),
        atol=1e-12,
    )
    value, grads = fnn.value_and_grad(net, loss)(points[0], jnp.zeros((1, 1)), jnp.zeros(1))
    np.testing.assert_allclose(value, experiment.ripples(points[0]), atol=1e-14)
    np.testing.assert_allclose(grads, experiment.ripples_grad(points[0]), atol=1e-12)


@pytest.fixture(scope="module")
def ways():
    """Ways through the plane; `tests/test_experiments.py` runs the whole experiment."""
    with jax.numpy_dtype_promotion("standard"):
        return [
            experiment.walk(dataclasses.replace(experiment.Config(), repetitions=50), name)
            for name in ("ES", "SNES", "backprop")
        ]


def test_populations_cross_the_ripples_that_stop_gradient_descent(ways):
    es, snes, descent = ways
    assert np.linalg.norm(experiment.ripples_grad(descent.path[-1])) < 1e-3  # it stands still
    assert descent.losses[:, -1].min() > 5
    assert snes.last < 0.01
    assert es.last < 1
    assert max(way.losses[:, -1].max() for way in (es, snes)) < 4
    for way, low, high in ((es, 0.7, 1.4), (snes, 0, 0.1)):
        assert low < (way.clouds[-1].std(0) / way.clouds[0].std(0)).mean() < high
    np.testing.assert_allclose(es.clouds.mean(1), es.path[:-1], atol=1e-5)  # pairs are symmetric


def test_the_title_counts_forward_passes(ways, tmp_path):
    def on_digits(name, accuracy, passes):
        return experiment.Run(name, np.array([accuracy, accuracy]), passes, np.nan, 1.0)

    rest = tuple(on_digits(name, [0.9, 0.95], 30) for name in experiment.NAMES[1:])
    result = experiment.Result((*ways, ways[-1]), (on_digits("ES", [0.5, 0.86], 600), *rest))
    text = experiment.sentence(result, experiment.Config())
    assert f"from 11.4 to {ways[0].last:.2f} (ES)" in text
    assert "95.0 % (backprop); for 85 % ES takes 40 times backprop's forward passes" in text
    never = result._replace(digits=(on_digits("ES", [0.5, 0.6], 600), *rest))
    assert math.isnan(never.digits[0].to_goal)
    assert "for 85 % not all get there" in experiment.sentence(never, experiment.Config())
    experiment.draw(tmp_path / "evolution.png", result, experiment.Config())
    assert (tmp_path / "evolution.png").stat().st_size > 1e4


def test_the_cosine_of_backprop_with_the_gradient_is_one():
    batch = X.astype(np.float32), T.astype(np.float32)
    assert experiment.cosine(
        fnn.rules.backprop(NET, LOSS), NET, params_of(NET, jnp.float32), KEY, *batch
    ) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cloud": 7}, "`cloud` must be an even number, at least `parents` 2; got 7"),
        ({"population": 0}, "`population` must be a whole number above 0, got 0"),
        ({"parents": 8}, "`cloud` must be an even number, at least `parents` 8; got 6"),
        ({"stds": (0.1, 0.0, 0.1)}, r"`stds\[1\]` must be a finite number above 0, got 0.0"),
        ({"hidden": (0,)}, r"`hidden\[0\]` must be a whole number above 0, got 0"),
        ({"seeds": ()}, "`seeds` must be at least one, each once"),
        ({"seeds": (-1,)}, "`seed` must be in 0"),
    ],
    ids=str,
)
def test_a_bad_flag_is_an_error_that_names_it(flags, message):
    with pytest.raises(ValueError, match=message):
        experiment.run(dataclasses.replace(experiment.TINY, **flags))
