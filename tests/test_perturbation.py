"""Forward gradients, node and weight perturbation.

Formulas written out in NumPy, identities, limits, variances, and the experiment.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide

import fnn
from experiments import forward_gradient_variance
from fnn import losses
from fnn.nets.blocks import blocks
from fnn.rules.forward_gradient import along, errors_along, forward_gradient, noisy_losses, slope
from fnn.rules.perturbation import difference, node_perturbation, weight_perturbation

KEY = jax.random.key(3)
LABELS, SQUARE = losses.softmax_cross_entropy_with_integer_labels, losses.l2_loss
RULES = {
    "forward gradient, weights": functools.partial(forward_gradient, tangents=2),
    "forward gradient, activations": functools.partial(
        forward_gradient, tangents=2, perturb="activations"
    ),
    "node": node_perturbation,
    "node, outputs too": functools.partial(
        node_perturbation, std=0.1, antithetic=True, perturb_outputs=True
    ),
    "weight": functools.partial(weight_perturbation, std=0.1),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def problem(sizes=(3, 4, 5, 2), batch=5, seed=0):
    """Params with biases of an mlp, inputs and real targets, in float64; for NumPy and for JAX."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(m, n)) / np.sqrt(m), 0.3 * rng.normal(size=n))
        for m, n in itertools.pairwise(sizes)
    ]
    return layers, rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))


def params_of(layers):
    """The params of `fnn.mlp`."""
    made = [fnn.nets.layers.Dense(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    return (*((p, ()) for p in made[:-1]), made[-1])


def np_losses(layers, x, t, noise=()):
    """Half the squared error of a tanh mlp, and all hidden outputs, with noise on what the first
    blocks put out."""
    hs = [x]
    for i, (w, b) in enumerate(layers):
        z = hs[-1] @ w + b
        h = np.tanh(z) if i < len(layers) - 1 else z
        hs.append(h + noise[i] if i < len(noise) else h)
    return 0.5 * ((hs[-1] - t) ** 2).sum(1), hs


def np_local_gradients(layers, hs, told, shares):
    """Each block's gradient where example i's output `h_l` has the error `told[l][i]`.

    A loop over examples.
    """
    grads = [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    for i, share in enumerate(shares):
        for k, (dw, db) in enumerate(grads):
            slope_of = 1 - hs[k + 1][i] ** 2 if k < len(layers) - 1 else np.ones_like(db)
            dz = share * told[k][i] * slope_of
            dw += np.outer(hs[k][i], dz)
            db += dz
    return params_of(grads)


def np_gradient(layers, x, t):
    """Backprop of one example or of the mean, and dE_i/dh_l."""
    _, hs = np_losses(layers, x, t)
    dhs = [hs[-1] - t]
    dz = dhs[0]
    for (w, _), h in zip(layers[:0:-1], hs[-2:0:-1], strict=True):
        dhs.insert(0, dz @ w.T)
        dz = dhs[0] * (1 - h**2)
    return np_local_gradients(layers, hs, dhs, np.full(len(x), 1 / len(x))), dhs


def step_key(key, tangents=1):
    """The keys that a rule whose state is `key` draws its directions by."""
    return jax.random.split(jax.random.split(key)[1], tangents)


def np_node_noise(key, batch, widths):
    """Row i: numbers drawn by the key folded with i, cut into blocks."""
    rows = [
        np.asarray(jax.random.normal(jax.random.fold_in(key, i), (sum(widths),), jnp.float64))
        for i in range(batch)
    ]
    return np.split(np.stack(rows), np.cumsum(widths)[:-1], axis=1)


def np_weight_noise(key, layers):
    """Numbers drawn by one key, cut into w, b of the first layer, of the second ..."""
    drawn = np.asarray(
        jax.random.normal(key, (sum(w.size + b.size for w, b in layers),), jnp.float64)
    )
    noise = []
    for w, b in layers:
        noise.append((drawn[: w.size].reshape(w.shape), drawn[w.size : w.size + b.size]))
        drawn = drawn[w.size + b.size :]
    return noise


def np_inner(a, b):
    return sum((x * y).sum() for x, y in zip(wide(a), wide(b), strict=True))


def np_shifted(layers, noise, std):
    return [(w + std * v, b + std * u) for (w, b), (v, u) in zip(layers, noise, strict=True)]


WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 1.5])
NET = fnn.mlp((3, 4, 5, 2), "tanh")


@functools.cache
def step_of(rule, net, loss):
    return jax.jit(rule(net, loss).value_and_grad)


def run_rule(rule, x, t, weights=None, net=NET, params=None, loss=SQUARE, key=KEY):
    params = params_of(problem()[0]) if params is None else params
    return step_of(rule, net, loss)(params, key, jnp.asarray(x), jnp.asarray(t), weights)


@pytest.mark.usefixtures("x64")
def test_forward_gradients_are_their_formulas():
    layers, x, t = problem()
    values, hs = np_losses(layers, x, t)
    shares = WEIGHTS / WEIGHTS.sum()
    value, grads, _ = run_rule(functools.partial(forward_gradient, tangents=3), x, t, WEIGHTS)
    each = [np_gradient(layers, x[i : i + 1], t[i : i + 1])[0] for i in range(5)]
    true = jax.tree.map(
        lambda *g: sum(s * np.asarray(a) for s, a in zip(shares, g, strict=True)), *each
    )
    shadows = [params_of(np_weight_noise(k, layers)) for k in step_key(KEY, 3)]
    expected = jax.tree.map(
        lambda *vs: sum(vs) / 3,
        *(jax.tree.map(lambda a, v=v: np_inner(true, v) * np.asarray(a), v) for v in shadows),
    )
    assert error(wide(grads), wide(expected)) < 1e-12
    assert abs(float(value) - (shares * values).sum()) < 1e-14

    _, grads, _ = run_rule(
        functools.partial(forward_gradient, tangents=3, perturb="activations"), x, t, WEIGHTS
    )
    dhs = np_gradient(layers, x, t)[1]
    told = [np.zeros_like(dhs[0]), np.zeros_like(dhs[1]), dhs[2]]
    for k in step_key(KEY, 3):
        noise = np_node_noise(k, 5, (4, 5))
        along_noise = sum((d * u).sum(1) for d, u in zip(dhs, noise, strict=False))
        for j, u in enumerate(noise):
            told[j] += along_noise[:, None] * u / 3
    assert error(wide(grads), wide(np_local_gradients(layers, hs, told, shares))) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("antithetic", "outputs"),
    [(False, False), (True, True)],
    ids=["plain", "antithetic, perturbed outputs"],
)
def test_node_perturbation_is_its_formula(antithetic, outputs):
    layers, x, t = problem()
    values, hs = np_losses(layers, x, t)
    rule = functools.partial(
        node_perturbation, std=0.3, antithetic=antithetic, perturb_outputs=outputs
    )
    value, grads, _ = run_rule(rule, x, t, WEIGHTS)
    noise = np_node_noise(step_key(KEY)[0], 5, (4, 5, 2) if outputs else (4, 5))
    up, down = (np_losses(layers, x, t, [sign * 0.3 * u for u in noise])[0] for sign in (1, -1))
    change = (up - down) / 0.6 if antithetic else (up - values) / 0.3
    told = [change[:, None] * u for u in noise] + ([] if outputs else [hs[-1] - t])
    shares = WEIGHTS / WEIGHTS.sum()
    assert error(wide(grads), wide(np_local_gradients(layers, hs, told, shares))) < 1e-12
    assert abs(float(value) - (shares * values).sum()) < 1e-14


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("antithetic", "size"), [(False, 1), (True, 8)])
def test_weight_perturbation_is_its_formula(antithetic, size):
    """Of 19 examples, so that the last of the microbatches of 8 is not full."""
    layers, x, t = problem(batch=19)
    values, _ = np_losses(layers, x, t)
    weights = np.arange(1, 20) % 3 / 2
    value, grads, _ = run_rule(
        functools.partial(
            weight_perturbation, std=0.3, antithetic=antithetic, microbatch_size=size
        ),
        x,
        t,
        weights,
    )
    expected = jax.tree.map(np.zeros_like, params_of(layers))
    for i in range(19):
        noise = np_weight_noise(jax.random.fold_in(jax.random.split(KEY)[1], i), layers)
        up, down = (
            np_losses(np_shifted(layers, noise, std), x[i : i + 1], t[i : i + 1])[0][0]
            for std in (0.3, -0.3)
        )
        change = (up - down) / 0.6 if antithetic else (up - values[i]) / 0.3
        expected = jax.tree.map(
            lambda e, v, c=change, w=weights[i]: e + w / weights.sum() * c * np.asarray(v),
            expected,
            params_of(noise),
        )
    assert error(wide(grads), wide(expected)) < 1e-12
    assert abs(float(value) - (weights * values).sum() / weights.sum()) < 1e-14


@pytest.mark.usefixtures("x64")
def test_the_mean_over_orthogonal_directions_is_the_gradient_exactly():
    """(1/P) sum_i (g . sqrt(P) e_i) sqrt(P) e_i = g.

    What is left to chance is the directions alone.
    """
    layers, x, t = problem()
    params, true = params_of(layers), np_gradient(layers, x, t)[0]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    mean = fnn.mean_loss(NET, SQUARE)
    directions = jnp.sqrt(flat.size) * jnp.eye(flat.size)
    every = jax.jit(
        jax.vmap(
            lambda v: along(lambda p: mean(p, jnp.asarray(x), jnp.asarray(t)), params, unravel(v))[
                1
            ]
        )
    )(directions)
    assert error(wide(jax.tree.map(lambda a: a.mean(0), every)), wide(true)) < 1e-12

    chain = blocks(NET)
    clean = noisy_losses(chain.layers, SQUARE, chain.split(params), jnp.asarray(x), jnp.asarray(t))

    def told(row):
        """What the hidden blocks are told where every example's 9 hidden units are perturbed along
        one row."""
        noise = jnp.broadcast_to(row, (5, 9))
        return errors_along(clean, clean([]), [noise[:, :4], noise[:, 4:]], slope)

    hidden = jax.jit(jax.vmap(told))(3.0 * jnp.eye(9))
    for estimate, expected in zip(hidden, np_gradient(layers, x, t)[1], strict=False):
        np.testing.assert_allclose(estimate.mean(0), expected, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_estimates_have_the_mean_and_the_second_moment_of_their_theory():
    """E|g|^2 = (P + 2)|G|^2 along P weights, and so for the N units of a net with one hidden block
    along activations.

    One draw of |g|^2 / |G|^2 is r^2 (r^2 + n^2), r^2 ~ chi^2_1, n^2 ~ chi^2_m, m = P - 1, of
    variance 96 + 30 m + 2 m^2. The bounds are 5 standard errors, which are a small part of 1, so
    that P + 1 or P + 3 would fail.
    """
    net, draws = fnn.mlp((1, 2, 1), "tanh"), 2**16
    layers, x, t = problem((1, 2, 1), batch=1)
    params = params_of(layers)
    true, dhs = np_gradient(layers, x, t)
    x, t = jnp.asarray(x), jnp.asarray(t)
    rule, local = (
        forward_gradient(net, SQUARE),
        forward_gradient(net, SQUARE, perturb="activations"),
    )

    @jax.jit
    def sample(keys):
        g = jax.vmap(
            lambda key: jax.flatten_util.ravel_pytree(rule.value_and_grad(params, key, x, t)[1])[0]
        )(keys)
        return g, jax.vmap(lambda key: local.signals(params, key, x, t)[0][0])(keys)

    g, d = sample(jax.random.split(jax.random.key(11), draws))
    for found, expected, m in (
        (g, np.concatenate([a.ravel() for a in wide(true)]), 6),
        (d, dhs[0][0], 1),
    ):
        size = (expected**2).sum()
        ratio, standard_error = (
            (found**2).sum(1).mean() / size,
            np.sqrt((96 + 30 * m + 2 * m**2) / draws),
        )
        assert 5 * standard_error < 0.5
        assert abs(ratio - (m + 3)) < 5 * standard_error  # P + 2 with P = m + 1
        of_mean = np.sqrt((size + expected**2) / draws)  # Var g_j = |G|^2 + G_j^2
        assert (np.abs(found.mean(0) - expected) < 5 * of_mean).all()
        assert (5 * of_mean < 0.5 * np.abs(expected).max()).all()


@pytest.mark.usefixtures("x64")
def test_small_perturbations_are_forward_gradients():
    """With the same noise, to first order in std, to second order where antithetic."""
    layers, x, t = problem()
    _, limit, _ = run_rule(
        functools.partial(forward_gradient, perturb="activations"), x, t, WEIGHTS
    )
    each = [np_gradient(layers, x[i : i + 1], t[i : i + 1])[0] for i in range(5)]
    noise = [
        params_of(np_weight_noise(jax.random.fold_in(jax.random.split(KEY)[1], i), layers))
        for i in range(5)
    ]
    scaled = [
        w / WEIGHTS.sum() * np_inner(g, v) for w, g, v in zip(WEIGHTS, each, noise, strict=True)
    ]
    weight_limit = jax.tree.map(
        lambda *vs: sum(s * v for s, v in zip(scaled, vs, strict=True)), *noise
    )
    off = {}
    for rule, antithetic, std in (
        (node_perturbation, False, 1e-6),
        (node_perturbation, True, 1e-2),
        (node_perturbation, True, 1e-4),
        (weight_perturbation, False, 1e-6),
    ):
        _, grads, _ = run_rule(
            functools.partial(rule, std=std, antithetic=antithetic), x, t, WEIGHTS
        )
        off[rule, std] = error(
            wide(grads), wide(limit if rule is node_perturbation else weight_limit)
        )
    assert max(off[node_perturbation, 1e-6], off[weight_perturbation, 1e-6]) < 1e-4
    assert off[node_perturbation, 1e-4] < 1e-6
    # std by a hundred, the error by ten thousand
    assert 0.3e-4 < off[node_perturbation, 1e-4] / off[node_perturbation, 1e-2] < 3e-4


@pytest.mark.usefixtures("x64")
def test_weight_perturbation_has_the_gradient_of_the_loss_averaged_over_the_noise():
    """Of a quadratic that is the gradient itself for any std.

    One weight, E = (w - 1)^2 / 2, and 40,000 examples alike.
    """
    net, n, std = fnn.serial(fnn.dense(1, 1, bias_init=None)), 40_000, 2.0
    params = (fnn.nets.layers.Dense(jnp.array([[3.0]]), None),)
    _, grads, _ = jax.jit(weight_perturbation(net, SQUARE, std=std).value_and_grad)(
        params, KEY, jnp.ones((n, 1)), jnp.ones((n, 1))
    )
    # (2 v + std v^2 / 2) v has mean 2 and variance 4 E v^4 + std^2 / 4 E v^6 - 4 = 12 + 15 - 4
    assert abs(float(grads[0].w[0, 0]) - 2) < 5 * np.sqrt(23 / n) < 0.2


@every_rule
def test_every_example_has_noise_of_its_own_key_and_padding_counts_nothing(x64, rule):
    _, x, t = problem()
    value, grads, state = run_rule(rule, x, t, np.array([3.0, 3, 3, 0, 0]))
    assert (jax.random.key_data(state) == jax.random.key_data(jax.random.split(KEY)[0])).all()
    _, other, _ = run_rule(
        rule, np.concatenate([x[:3], np.full((2, 3), 1e3)]), t, np.array([3.0, 3, 3, 0, 0])
    )
    alone_value, alone, _ = run_rule(rule, x[:3], t[:3])  # without weights: all alike
    assert error(wide(other), wide(grads)) <= 1e-12
    assert error(wide((alone, alone_value)), wide((grads, value))) <= 1e-12
    nothing, zeros, _ = run_rule(rule, x, t, np.zeros(5))
    assert float(nothing) == 0 == max(np.abs(a).max() for a in wide(zeros))


def test_rows_are_perturbed_apart(x64):
    """Two examples alike get different noise, in one step and from step to step."""
    layers, x, t = problem(batch=1)
    x, t = (jnp.asarray(np.repeat(a, 2, axis=0)) for a in (x, t))
    for rule in (
        node_perturbation(NET, SQUARE),
        forward_gradient(NET, SQUARE, perturb="activations"),
    ):
        signals = jax.jit(rule.signals)
        first, again = (
            signals(params_of(layers), key, x, t)[0] for key in (KEY, jax.random.split(KEY)[0])
        )
        assert np.abs(first[0] - first[1]).min() > 1e-6
        assert np.abs(first - again).min() > 1e-6
    only = [
        run_rule(RULES["weight"], x, t, jnp.asarray(w), params=params_of(layers))[1]
        for w in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert error(wide(only[0]), wide(only[1])) > 0.1


@every_rule
def test_mlp_and_a_flat_serial_with_a_repeat_take_the_same_step(x64, rule):
    layers, x, t = problem((3, 4, 4, 4, 2))
    p = [fnn.nets.layers.Dense(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    act, dense = fnn.activations.tanh, fnn.dense
    nets = {
        fnn.mlp((3, 4, 4, 4, 2), "tanh"): params_of(layers),
        fnn.serial(dense(3, 4), act, fnn.repeat(fnn.serial(dense(4, 4), act), 2), dense(4, 2)): (
            p[0],
            (),
            (jax.tree.map(lambda *a: jnp.stack(a), p[1], p[2]), ()),
            p[3],
        ),
    }
    found = [
        (value, *(blocks(net).split(grads)))
        for net, params in nets.items()
        for value, grads, _ in [run_rule(rule, x, t, net=net, params=params)]
    ]
    assert error(wide(found[1]), wide(found[0])) <= 1e-12


@every_rule
@pytest.mark.parametrize(
    "dtype", [jnp.float64, jnp.float32, jnp.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_dtypes_are_kept_and_nothing_is_weak(x64, rule, dtype):
    layers, x, t = problem()
    params, x, t = cast((params_of(layers), jnp.asarray(x), jnp.asarray(t)), dtype)
    made = rule(NET, SQUARE)
    results = jax.eval_shape(made.value_and_grad, params, KEY, x, t, jnp.ones(5, jnp.float32))[:2]
    assert {(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(results)} == {
        (jnp.dtype(dtype), False)
    }
    chex.assert_trees_all_equal_shapes(results[1], params)


def test_float32_is_near_float64(x64):
    """Along the same direction; JAX draws other numbers for other dtypes."""
    layers, x, t = problem()
    everything = (
        params_of(layers),
        jnp.asarray(x),
        jnp.asarray(t),
        params_of(np_weight_noise(KEY, layers)),
    )
    shadow = jax.jit(lambda p, x, t, v: along(lambda q: fnn.mean_loss(NET, SQUARE)(q, x, t), p, v))
    wide_one, narrow = (shadow(*cast(everything, dtype)) for dtype in (jnp.float64, jnp.float32))
    assert error(wide(narrow), wide(wide_one)) < 1e-5


@every_rule
@pytest.mark.parametrize(
    "net",
    [fnn.mlp((1, 1, 1), "tanh"), fnn.serial(fnn.embedding(3, 2), fnn.dense(2, 1))],
    ids=["one unit", "embedding"],
)
def test_the_least_nets_take_a_step_on_one_example(rule, net):
    x = jnp.ones((1, 1)) if net.layers[0].name == "serial" else jnp.array([2])
    params = jax.jit(net.init)(jax.random.key(0))
    _, grads, _ = run_rule(rule, x, np.full((1, 1), 3.0, np.float32), net=net, params=params)
    chex.assert_trees_all_equal_shapes(grads, params)
    assert all(np.isfinite(a).all() for a in wide(grads))
    assert any(a.any() for a in wide(grads))


def largest(jaxpr):
    """The most numbers in one array of a program, those of inner programs included."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [
        p
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for p in (value if isinstance(value, tuple) else (value,))
    ]
    return max(
        sizes
        + [
            largest(getattr(p, "jaxpr", p))
            for p in inner
            if hasattr(getattr(p, "jaxpr", p), "eqns")
        ],
        default=0,
    )


def test_no_array_is_as_large_as_tangents_or_examples_times_parameters():
    net = fnn.mlp((8, 32, 32, 1))
    params = jax.eval_shape(net.init, KEY)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for rule, expected in (
        (forward_gradient(net, SQUARE, tangents=64), size),
        # two hidden blocks of 32 units, 64 examples
        (forward_gradient(net, SQUARE, tangents=64, perturb="activations"), 64 * 64),
        (weight_perturbation(net, SQUARE, microbatch_size=4), 4 * size),
    ):
        program = jax.make_jaxpr(rule.value_and_grad)(
            params, KEY, jnp.ones((64, 8)), jnp.ones((64, 1))
        )
        assert largest(program.jaxpr) <= 2 * expected  # noise is drawn as pairs of words


def test_a_shape_that_cannot_be_meant_is_named():
    x, t = jnp.ones((4, 3)), jnp.ones((3, 2))
    params = jax.jit(NET.init)(KEY)
    for rule in RULES.values():
        with pytest.raises(ValueError, match="`x` has 4 rows but `targets` has 3"):
            rule(NET, SQUARE).value_and_grad(params, KEY, x, t)


@pytest.mark.parametrize(
    ("tangents", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_tangents_are_counted(tangents, kind):
    with pytest.raises(kind, match="`tangents` must be a whole number above 0, got"):
        forward_gradient(NET, SQUARE, tangents=tangents)


@pytest.mark.parametrize("rule", [node_perturbation, weight_perturbation])
def test_bad_settings_of_perturbation_are_named(rule):
    for std, kind in (
        (0.0, ValueError),
        (-0.1, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        ("0.1", TypeError),
    ):
        with pytest.raises(kind, match="`std` must be a finite number above 0, got"):
            rule(NET, SQUARE, std=std)
    with pytest.raises(TypeError, match="`antithetic` must be True or False, got 1"):
        rule(NET, SQUARE, antithetic=1)
    with pytest.raises(TypeError, match="`perturb_outputs` must be True or False, got 'yes'"):
        node_perturbation(NET, SQUARE, perturb_outputs="yes")
    with pytest.raises(ValueError, match="`microbatch_size` must be a whole number above 0, got 0"):
        weight_perturbation(NET, SQUARE, microbatch_size=0)


def test_other_arguments_that_cannot_be_meant_are_named():
    for rule in (weight_perturbation, forward_gradient):
        with pytest.raises(ValueError, match="`params` has no arrays, so nothing can be perturbed"):
            rule(fnn.activations.relu, SQUARE).value_and_grad(
                (), KEY, jnp.ones((5, 2)), jnp.ones((5, 2))
            )
    with pytest.raises(
        ValueError, match=r"Unknown perturb 'activities'\. Did you mean 'activations'\?"
    ):
        forward_gradient(NET, SQUARE, perturb="activities")
    one_block = fnn.mlp((3, 2))
    for rule in (node_perturbation, functools.partial(forward_gradient, perturb="activations")):
        with pytest.raises(ValueError, match="must be a chain of at least two layers with weights"):
            rule(one_block, SQUARE)
    for rule in (node_perturbation, weight_perturbation, forward_gradient):
        with pytest.raises(TypeError, match="`net` must be a Layer"):
            rule(None, SQUARE)
        with pytest.raises(TypeError, match="`loss` must be a Loss"):
            rule(NET, "l2_loss")


def test_an_activation_without_slope_warns_but_not_where_no_derivative_is_taken():
    flat = fnn.mlp((2, 3, 1), "step")
    for rule in (
        node_perturbation,
        forward_gradient,
        functools.partial(forward_gradient, perturb="activations"),
    ):
        with pytest.warns(UserWarning, match="derivative of `step` is 0 everywhere"):
            rule(flat, SQUARE)
    layers, x, t = problem((2, 3, 1), batch=4)
    _, grads, _ = run_rule(
        functools.partial(weight_perturbation, std=0.5),
        x.astype(np.float32),
        t.astype(np.float32),
        net=flat,
        params=cast(params_of(layers), jnp.float32),
    )
    assert wide(grads)[0].any()


def blobs(n=48):
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, n).astype(np.int32)
    return (rng.normal(size=(n, 5)) + 2 * np.eye(3, 5)[t]).astype(np.float32), t


def test_fit_learns_and_many_nets_at_once_are_the_nets_one_by_one():
    net, data = fnn.mlp((5, 6, 3), "tanh"), blobs()
    made = forward_gradient(net, LABELS, perturb="activations")
    keys, settings = jax.random.split(KEY, 2), {"epochs": 20, "batch_size": 24}
    params, history = fnn.fit_many(made, optax.sgd(0.1), net.init, data, keys=keys, **settings)
    assert (history.loss[:, -1] < 0.8 * history.loss[:, 0]).all()
    params_key, key = jax.random.split(keys[1])
    one, _ = fnn.fit(made, optax.sgd(0.1), jax.jit(net.init)(params_key), data, key=key, **settings)
    assert error([leaf[1] for leaf in wide(params)], wide(one)) < 1e-4
    assert error([leaf[0] for leaf in wide(params)], wide(one)) > 0.1


def test_difference_and_slope_of_a_line_are_its_slope():
    for change in (slope, difference(0.5), difference(0.25, antithetic=True)):
        found = change(
            lambda u: 3.0 * u[0] - 2.0 * u[1] + 1.0, jnp.ones(4), [jnp.arange(4.0), jnp.ones(4)]
        )
        np.testing.assert_allclose(found, 3.0 * np.arange(4.0) - 2.0, atol=1e-5)


def test_cosines_are_those_of_the_theory():
    """Along weights the mean over draws, so that sqrt(K / (K + P - 1)), the root of the mean
    square, would fail at K = 1."""
    draws, counts, net = 600, np.array([1, 2, 16]), fnn.mlp((8, 6, 3))
    rng = np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 16), jnp.int32),
    )
    params = jax.jit(net.init)(KEY)
    for name, rule in (
        ("weights", forward_gradient(net, LABELS)),
        ("activations", forward_gradient(net, LABELS, perturb="activations")),
    ):
        measure = jax.jit(functools.partial(forward_gradient_variance.cosines, net, rule, most=16))
        found = np.asarray(measure(params, batch, jax.random.split(KEY, draws)))[:, counts - 1]
        theory = forward_gradient_variance.expected(net, LABELS, params, batch, name, counts)
        if name == "weights":
            off = np.abs(found[..., 0].mean(0) - theory[0]) / (
                found[..., 0].std(0) / np.sqrt(draws)
            )
            assert off.max() < 4
            p, k = sum(leaf.size for leaf in jax.tree.leaves(params)), counts
            assert abs(np.sqrt(1 / p) - theory[0, 0]) > 4 * found[:, 0, 0].std() / np.sqrt(draws)
            # the variance of the squared cosine
            beta = 2 * k * (p - 1) / ((k + p - 1) ** 2 * (k + p + 1))
            assert (
                np.abs((found[..., 0] ** 2).mean(0) - k / (k + p - 1)) < 4 * np.sqrt(beta / draws)
            ).all()
        else:
            np.testing.assert_allclose(found[:, -1].mean(0), theory[:, -1], rtol=0.03)


def test_the_variance_along_activations_is_that_of_the_theory():
    net, draws = fnn.mlp((4, 5, 6, 3)), 2**14
    rng = np.random.default_rng(1)
    batch = (
        jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 4), jnp.int32),
    )
    params = jax.jit(net.init)(KEY)
    step = forward_gradient(net, LABELS, perturb="activations").value_and_grad
    many = jax.jit(
        jax.vmap(lambda key: jax.flatten_util.ravel_pytree(step(params, key, *batch)[1])[0])
    )
    true = np.concatenate(
        [a.ravel() for a in wide(fnn.value_and_grad(net, LABELS)(params, *batch)[1])]
    )
    squares = ((np.asarray(many(jax.random.split(KEY, draws)), np.float64) - true) ** 2).sum(1)
    expected = forward_gradient_variance.activity_variance(net, LABELS, params, batch)
    standard_error = squares.std() / np.sqrt(draws)
    assert abs(squares.mean() - expected) < 4 * standard_error < 0.1 * expected


def test_flags_of_the_experiment_that_cannot_be_meant_are_named():
    """That it runs with its TINY config is tested in test_experiments.py."""
    for flag, match in (
        ({"hidden": ()}, "`hidden` is empty"),
        ({"draws": 1}, "`draws` must be at least 2"),
        ({"tangents": 0}, "`tangents`"),
    ):
        with pytest.raises(ValueError, match=match):
            forward_gradient_variance.run(forward_gradient_variance.Config(**flag))
