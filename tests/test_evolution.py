"""Evolution: every update is the paper's, in NumPy, for the members that `rule.members` shows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import wide

import fnn
from experiments import evolution as experiment
from fnn import losses
from fnn.nets.layers import Dense
from fnn.rules.evolution import evolution_strategies, genetic_algorithm, snes

KEY = jax.random.key(5)
LOSS = losses.squared_error
NET = fnn.mlp((3, 4, 2), "tanh")  # of 26 parameters
X = np.linspace(-1, 1, 15).reshape(5, 3) ** 2
T = np.cos(np.arange(10.0)).reshape(5, 2)
WEIGHTS = np.array([1.0, 2.0, 0.0, 1.0, 0.5])


def draw_params(net=NET, dtype=jnp.float64):
    rng = np.random.default_rng(1)

    def leaf(s):
        return jnp.asarray(0.5 * rng.normal(size=s.shape), dtype)

    return jax.tree.map(leaf, jax.eval_shape(net.init, KEY))


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in wide(tree)])


def rows(tree):
    """Every member as a vector, `[members, d]`."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide(tree)], 1)


def loss_at(theta, weights=None):
    """The mean loss of `NET` at a vector of parameters, written out."""
    w1, b1, w2, b2 = theta[:12].reshape(3, 4), theta[12:16], theta[16:24].reshape(4, 2), theta[24:]
    values = ((np.tanh(X @ w1 + b1) @ w2 + b2 - T) ** 2).sum(1)
    return np.average(values, weights=weights)


def ranks(values):
    """Ranks 0 ... n - 1; equals share the mean of theirs; what is not finite is the worst."""
    v = [value if np.isfinite(value) else np.inf for value in values]
    return np.array([sum(b < a for b in v) + (sum(b == a for b in v) - 1) / 2 for a in v])


def utilities(values):
    """The paper's."""
    n = len(values)
    raw = np.maximum(0, np.log(n / 2 + 1) - np.log(ranks(values) + 1))
    return raw / raw.sum() - 1 / n


def members_of(rule, params, state):
    """`[members, d]`."""
    return rows(jax.jit(rule.members)(params, state))


# Evolution strategies


@pytest.mark.parametrize(
    ("fitness", "chunk"), [("centred_ranks", None), ("centred_ranks", 4), ("raw", 2), ("raw", 1000)]
)
def test_the_estimate_is_that_of_the_paper_for_the_noise_drawn(x64, fitness, chunk):
    params, n, std = draw_params(), 10, 0.3
    rule = evolution_strategies(NET, LOSS, population=n, std=std, fitness=fitness, chunk=chunk)
    z, theta = members_of(rule, params, KEY), flat(params)
    np.testing.assert_allclose(z[::2] + z[1::2], 2 * np.tile(theta, (n // 2, 1)), atol=1e-14)
    values = np.array([loss_at(row, WEIGHTS) for row in z])
    s = values if fitness == "raw" else ranks(values) / (n - 1) - 0.5
    value, grads, state = jax.jit(rule.value_and_grad)(params, KEY, X, T, WEIGHTS)
    expected = s @ (z - theta) / std / (n * std)
    np.testing.assert_allclose(flat(grads), expected, rtol=0, atol=1e-12)
    assert abs(float(value) - loss_at(theta, WEIGHTS)) < 1e-14
    assert jax.random.key_data(state).tolist() != jax.random.key_data(KEY).tolist()


@pytest.mark.parametrize("std", [1.0, 1e-2])
def test_raw_fitness_of_a_quadratic_loss_is_the_forward_gradient_whatever_the_std(x64, std):
    """Both signs of a step differ by the slope exactly where there is no third derivative."""
    net, n = fnn.dense(3, 2), 10
    params = net.init(KEY)
    rule = evolution_strategies(net, losses.l2_loss, population=n, std=std, fitness="raw")
    e = (members_of(rule, params, KEY)[::2] - flat(params)) / std
    gradient = flat(fnn.value_and_grad(net, losses.l2_loss)(params, X, T)[1])
    found = flat(rule.value_and_grad(params, KEY, X, T)[1])
    np.testing.assert_allclose(found, e @ gradient @ e / len(e), rtol=0, atol=1e-12)


def test_noise_is_standard_normal_and_independent_and_gives_the_cosine_that_is_claimed(x64):
    params, m, d = draw_params(), 10, 26
    rule = evolution_strategies(NET, LOSS, population=2 * 400 * m, std=0.5)
    noise = ((members_of(rule, params, KEY)[::2] - flat(params)) / 0.5).reshape(400, m, d)
    covariance = np.cov(noise.reshape(-1, d), rowvar=False)
    assert abs(covariance - np.eye(d)).max() < 5 * np.sqrt(2 / 4000)
    gradient = np.cos(np.arange(d))
    g = np.stack([e.T @ (e @ gradient) / m for e in noise])
    share = ((g @ gradient) ** 2 / (g**2).sum(1)).mean() / (gradient @ gradient)
    assert share == pytest.approx(m / (m + d + 1), rel=0.1)
    # right on average: sqrt((d + 1) / (400 m)) is 0.08
    assert np.linalg.norm(g.mean(0) - gradient) < 0.15 * np.linalg.norm(gradient)


# SNES


@pytest.mark.parametrize(("population", "chunk"), [(None, 4), (2, None)])
def test_snes_updates_mean_and_std_as_the_paper(x64, population, chunk):
    params, d = draw_params(), 26
    rule = snes(NET, LOSS, population=population, std=0.2, chunk=chunk)
    state, update = rule.init(KEY, params), jax.jit(rule.value_and_grad)
    mu, sigma = flat(params), np.full(d, 0.2)
    for _ in range(3):
        z = members_of(rule, params, state)
        assert len(z) == (population or 4 + math.floor(3 * math.log(d)))
        s = (z - mu) / sigma
        value, grads, state = update(params, state, X, T, WEIGHTS)
        assert abs(float(value) - loss_at(mu, WEIGHTS)) < 1e-13
        u = utilities([loss_at(row, WEIGHTS) for row in z])
        mu = mu + sigma * (u @ s)
        eta = (3 + math.log(d)) / (5 * math.sqrt(d))
        sigma = sigma * np.exp(eta / 2 * (u @ (s**2 - 1)))
        params = jax.tree.map(jnp.subtract, params, grads)
        np.testing.assert_allclose(flat(params), mu, rtol=0, atol=1e-12)
        np.testing.assert_allclose(flat(state.std), sigma, rtol=0, atol=1e-12)
    assert sigma.std() > 0.003


# Genetic algorithm


@pytest.mark.parametrize(("parents", "chunk", "kind"), [(1, None, "threefry2x32"), (3, 5, "rbg")])
def test_the_best_children_become_parents_and_the_best_of_all_the_params(x64, parents, chunk, kind):
    """JAX's rbg keys give other numbers under `vmap`, and children are drawn twice."""
    params = draw_params()
    rule = genetic_algorithm(NET, LOSS, parents=parents, children=8, std=0.2, chunk=chunk)
    state, update = rule.init(jax.random.key(5, impl=kind), params), jax.jit(rule.value_and_grad)
    np.testing.assert_array_equal(rows(state.parents), np.tile(flat(params), (parents, 1)))
    for _ in range(3):
        children = members_of(rule, params, state)
        values = [loss_at(child, WEIGHTS) for child in children]
        value, grads, state = update(params, state, X, T, WEIGHTS)
        chosen = np.argsort(values)[:parents]
        np.testing.assert_allclose(rows(state.parents), children[chosen], rtol=0, atol=1e-14)
        assert abs(float(value) - min(values)) < 1e-13
        params = jax.tree.map(jnp.subtract, params, grads)
        np.testing.assert_allclose(flat(params), children[chosen[0]], rtol=0, atol=1e-14)


def test_children_are_mutations_of_parents_chosen_evenly(x64):
    rule, params = genetic_algorithm(NET, LOSS, parents=4, children=2000, std=1e-3), draw_params()
    parents = jax.tree.map(lambda p: p[None] + jnp.arange(4.0).reshape(4, *(1,) * p.ndim), params)
    children = members_of(rule, params, rule.init(KEY, params)._replace(parents=parents))
    old = rows(parents)
    nearest = np.abs(children[:, None, 0] - old[None, :, 0]).argmin(1)
    counts = np.bincount(nearest, minlength=4)
    assert (np.abs(counts - 500) < 5 * np.sqrt(375)).all()  # 2000 / 4 and 3 / 4 of it
    mutations = (children - old[nearest]) / 1e-3
    assert abs(mutations.mean()) < 0.02
    assert abs(np.cov(mutations, rowvar=False) - np.eye(26)).max() < 5 * np.sqrt(2 / 2000)


# All three

SMALL = {
    evolution_strategies: {"population": 6},
    snes: {"population": 6},
    genetic_algorithm: {"parents": 2, "children": 6},
}
every_rule = pytest.mark.parametrize("rule", SMALL)
BROKEN = fnn.Loss(  # NaN, or minus infinity, where the output is above the target
    "broken",
    lambda y, t: jnp.where(y > t, jnp.where(y > 1.1 * t, -jnp.inf, jnp.nan), jnp.exp(y))[:, 0],
    lambda y, t: y,
)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [*SMALL.items(), (evolution_strategies, {"population": 6, "fitness": "raw"})],
    ids=lambda a: getattr(a, "__name__", str(a)),
)
def test_a_member_that_is_not_finite_ranks_last_and_poisons_nothing(x64, rule, settings):
    """By a net of one weight, at 0, and one example of 1, the outputs are the members."""
    params, std = Dense(jnp.zeros((1, 1)), None), 0.5
    made = rule(fnn.dense(1, 1, bias_init=None), BROKEN, std=std, **settings)
    state, step = made.init(KEY, params), jax.jit(made.value_and_grad)
    z = members_of(made, params, state)[:, 0]
    for limit, broken in ((np.sort(z)[-2], 1), (np.median(z), 3), (-1e3, 6)):
        values = np.where(z > limit, np.nan, np.exp(z))
        assert np.isnan(values).sum() == broken
        _, grads, after = step(params, state, jnp.ones((1, 1)), jnp.full((1, 1), limit))
        if rule is genetic_algorithm:
            order = np.argsort(ranks(values), kind="stable")
            expected = -z[order[0]]
            np.testing.assert_allclose(rows(after.parents)[:, 0], z[order[:2]], atol=1e-14)
        elif rule is snes:
            expected = -utilities(values) @ z
            assert np.isfinite(flat(after.std)).all()
        elif "fitness" in settings:
            gaps = values[::2] - values[1::2]
            expected = np.nan_to_num(gaps) @ z[::2] / std / (6 * std)
        else:
            expected = (ranks(values) / 5 - 0.5) @ z / std / (6 * std)
        assert float(grads.w[0, 0]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("rule", [evolution_strategies, snes])
def test_a_generation_without_differences_moves_nothing(x64, rule):
    flat_loss = fnn.Loss("flat", lambda y, t: jnp.ones(len(y)), lambda y, t: jnp.zeros_like(y))
    made, params = rule(NET, flat_loss, std=0.1, population=34), draw_params()
    _, grads, state = jax.jit(made.value_and_grad)(params, made.init(KEY, params), X, T)
    assert np.abs(flat(grads)).max() < 1e-16
    if rule is snes:
        np.testing.assert_allclose(flat(state.std), 0.1, rtol=1e-15)


def test_equal_members_share_the_mean_of_their_ranks(x64):
    """Losses of 0 and 1 only."""
    two = fnn.Loss("two", lambda y, t: (y > 0.2).astype(y.dtype)[:, 0], lambda y, t: y)
    net, params = fnn.dense(1, 1, bias_init=None), Dense(jnp.zeros((1, 1)), None)
    one = np.ones((1, 1))
    for rule in (evolution_strategies, snes):
        made = rule(net, two, std=0.5, population=20)
        state = made.init(KEY, params)
        z = members_of(made, params, state)[:, 0]
        values = (z > 0.2).astype(float)
        assert 3 < values.sum() < 17
        expected = -utilities(values) @ z
        if rule is evolution_strategies:
            expected = (ranks(values) / 19 - 0.5) @ z / 0.5 / (20 * 0.5)
        grads = made.value_and_grad(params, state, one, one)[1]
        assert float(grads.w[0, 0]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@every_rule
def test_values_and_std_are_float32_at_least_and_members_have_the_dtype_of_the_params(rule, dtype):
    made, params = rule(NET, LOSS, std=0.1, **SMALL[rule]), draw_params(dtype=dtype)
    state, (x, t) = made.init(KEY, params), (jnp.asarray(a, dtype) for a in (X, T))
    value, _, after = jax.eval_shape(made.value_and_grad, params, state, x, t)
    assert value.dtype == jnp.float32
    members = jax.eval_shape(made.members, params, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(members)} == {jnp.dtype(dtype)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(members)} == {6}
    if rule is snes:
        assert {leaf.dtype for leaf in jax.tree.leaves(after.std)} == {jnp.dtype(jnp.float32)}


es, ga = evolution_strategies, genetic_algorithm
BAD = {
    "an even number, .* got 7. Pass 8": lambda: es(NET, LOSS, population=7),
    "`population` must be a whole number above 0, got 0": lambda: es(NET, LOSS, population=0),
    "`population` must be a whole": lambda: snes(NET, LOSS, population=0),
    "`std` must be a finite number above 0, got 0.0": lambda: es(NET, LOSS, std=0.0),
    "`std` must be a finite number above 0, got nan": lambda: snes(NET, LOSS, std=math.nan),
    "Did you mean 'centred_ranks'": lambda: es(NET, LOSS, fitness="centered_ranks"),
    "at most `children`, .* got 9 of 8": lambda: ga(NET, LOSS, parents=9, children=8),
    "`parents` must be a whole number above 0, got 0": lambda: ga(NET, LOSS, parents=0),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_settings_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


# The experiment


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
    for way, low, high in ((es, 0.4, 2.5), (snes, 0, 0.1)):
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
        fnn.rules.backprop(NET, LOSS), NET, draw_params(dtype=jnp.float32), KEY, *batch
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
