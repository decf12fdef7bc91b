"""The hand-written gradient against `jax.grad` and against central differences, on random nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHAPES, TOLERANCE, Case, case, cast, default_jit, error, wide

import fnn
from fnn import losses
from fnn.nets.activations import ACTIVATIONS

NETS = range(120)
KINKED = {
    "step",
    "relu",
    "leaky_relu",
    "relu6",
    "elu",
    "celu",
    "selu",
    "hard_tanh",
    "hard_sigmoid",
    "hard_silu",
    "sparse_plus",
    "sparse_sigmoid",
}


def both(c: Case):
    """One function for manual and automatic `(value, grads)`.

    The automatic one writes its mean out.
    """

    def mean(params, x, targets, weights=None):
        values = c.loss.value(c.net.apply(params, x), targets)
        return values.mean() if weights is None else (values * weights).sum() / weights.sum()

    manual, automatic = fnn.value_and_grad(c.net, c.loss), jax.value_and_grad(mean)
    return lambda *batch: (manual(*batch), automatic(*batch))


def batch_of(c: Case):
    return (
        (c.params, c.x, c.targets) if c.weights is None else (c.params, c.x, c.targets, c.weights)
    )


def test_the_random_nets_cover_every_activation_loss_and_combinator(x64):
    cases = [
        (n % len(ACTIVATIONS), n // 2 % len(losses.LOSSES), n // 3 % len(SHAPES)) for n in NETS
    ]
    assert [len({c[i] for c in cases}) for i in range(3)] == [
        len(ACTIVATIONS),
        len(losses.LOSSES),
        len(SHAPES),
    ]


@pytest.mark.parametrize("number", NETS)
def test_manual_gradient_is_jax_grad_in_every_dtype(x64, number):
    """In float64, which is the truth, and in a shorter one: each of these on half of the nets."""
    c = case(number)
    dtypes = "float64", "float32" if number % 8 < 4 else "bfloat16"
    # every 30th net as JAX compiles by default, each of another shape
    compile_ = jax.jit if number % 30 else default_jit
    found = compile_(lambda *batch: {dtype: both(c)(*cast(batch, dtype)) for dtype in dtypes})(
        *batch_of(c)
    )
    # the numbers of a case are the same in every dtype, so this is the truth for all
    truth = wide(found["float64"][1][1])
    for dtype, ((value, grads), (automatic_value, automatic)) in found.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((value, grads)))
        assert value.dtype == automatic_value.dtype == dtype
        exact = wide(found["float64"][1][0])
        apart = error(wide(value), wide(automatic_value))
        assert apart <= TOLERANCE[dtype] or error(wide(value), exact) <= 2 * error(
            wide(automatic_value), exact
        ), (c.name, apart)
        ours, theirs = wide(grads), wide(automatic)
        # then jax.grad itself is far from the truth, and ours at most twice as far
        if error(ours, theirs) > TOLERANCE[dtype]:
            assert dtype != "float64", (c.name, error(ours, theirs))
            assert error(ours, truth) <= 2 * error(theirs, truth), (
                c.name,
                dtype,
                error(ours, theirs),
            )
    size = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in truth]))
    # leaf by leaf; a leaf that cancels to rounding is 0
    for ours, theirs in zip(wide(found["float64"][0][1]), truth, strict=True):
        assert error([ours], [theirs]) <= 1e-12 or np.linalg.norm(ours - theirs) <= 1e-14 * size, (
            c.name,
            error([ours], [theirs]),
        )


@pytest.mark.parametrize("number", range(1, 200, 24))
def test_manual_gradient_under_vmap_over_nets_is_the_gradient_of_each(x64, number):
    c = case(number)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), c.params)
    f = fnn.value_and_grad(c.net, c.loss)

    @jax.jit
    def check(several):
        together = jax.vmap(lambda p: f(p, c.x, c.targets)[1])(several)
        return together, [
            f(jax.tree.map(lambda leaf, i=i: leaf[i], several), c.x, c.targets)[1] for i in range(3)
        ]

    together, apart = check(several)
    for i, one in enumerate(apart):
        assert (
            error([leaf[i] for leaf in wide(together)], wide(one)) <= 1e-12
            or np.linalg.norm(wide(one)[0]) < 1e-12
        ), c.name


@pytest.mark.parametrize("number", [3, 40, 77, 114])
def test_manual_gradient_under_debug_nans_and_checking_leaks(x64, number):
    c = case(number)
    with jax.debug_nans(True), jax.checking_leaks():
        manual, automatic = jax.jit(both(c))(*batch_of(c))
    assert error(wide(manual), wide(automatic)) <= 1e-12, c.name


@pytest.mark.parametrize("number", [1, 50, 99])
def test_manual_gradient_without_jit_and_without_x64(number):
    with jax.enable_x64(True):
        c = case(number, deepest=2)
    batch = cast(jax.tree.map(np.asarray, batch_of(c)), np.float32)
    manual, automatic = both(c)(*batch)
    assert error(wide(manual), wide(automatic)) <= 1e-6, c.name


SMOOTH = [
    n
    for n in range(400)
    if ACTIVATIONS[n % len(ACTIVATIONS)].name not in KINKED
    and losses.LOSSES[n // 2 % 10].name != "hinge_loss"
][:50:2]  # every such activation and loss, and every shape


@pytest.mark.parametrize("number", SMOOTH)
def test_manual_gradient_is_the_central_difference(x64, number):
    c = case(number, deepest=3)
    f = fnn.mean_loss(c.net, c.loss)

    rng = np.random.default_rng(number)
    directions = jax.tree.map(lambda p: rng.normal(size=(3, *p.shape)), c.params)

    @jax.jit
    def slopes(directions, params, *rest):
        grads = fnn.value_and_grad(c.net, c.loss)(params, *rest)[1]

        def numeric(t):
            ahead, back = (
                jax.tree.map(lambda p, d, h=h: p + h * d, params, t) for h in (1e-6, -1e-6)
            )
            return (f(ahead, *rest) - f(back, *rest)) / 2e-6

        dots = jax.tree.map(
            lambda g, t: (g[None] * t).sum(tuple(range(1, t.ndim))), grads, directions
        )
        return (
            sum(jax.tree.leaves(dots)),
            jax.vmap(numeric)(directions),
            jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads))),
        )

    along, numeric, size = slopes(directions, *batch_of(c))
    np.testing.assert_allclose(
        along, numeric, rtol=1e-6, atol=1e-7 * max(float(size), 1e-2), err_msg=c.name
    )


def test_one_compilation_for_a_hundred_calls():
    import chex

    net = fnn.mlp((4, 3, 2), "tanh")
    f = jax.jit(chex.assert_max_traces(n=1)(fnn.value_and_grad(net, losses.l2_loss)))
    params = jax.jit(net.init)(jax.random.key(0))
    for i in range(100):
        _, grads = f(params, jnp.full((5, 4), i / 100, jnp.float32), jnp.ones((5, 2)))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    chex.clear_trace_counter()


def test_padding_does_no_harm_in_a_layer_with_a_pole_at_0():
    log = fnn.elementwise("log", jnp.log, lambda x, y: 1 / x)
    net = fnn.serial(log, fnn.dense(2, 1))
    params = net.init(jax.random.key(0))
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    t = jnp.ones((3, 1))
    both = fnn.value_and_grad(net, losses.l2_loss)
    automatic = jax.value_and_grad(fnn.mean_loss(net, losses.l2_loss))
    alone = both(params, x[:2], t[:2])
    for f in (both, automatic):
        padded = f(params, x, t, jnp.array([1.0, 1.0, 0.0]))
        for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_weights_are_a_weighted_mean_and_zero_is_padding(x64):
    c = case(2)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0, 2, len(c.x)))
    f = jax.jit(fnn.value_and_grad(c.net, c.loss))
    each = [f(c.params, c.x[i : i + 1], c.targets[i : i + 1]) for i in range(len(c.x))]
    value, grads = f(c.params, c.x, c.targets, weights)
    mean = jax.tree.map(
        lambda *g: sum(w * gi for w, gi in zip(weights, g, strict=True)) / weights.sum(), *each
    )
    assert error(wide((value, grads)), wide(mean)) <= 1e-12
    padded = (
        jnp.concatenate([c.x, c.x[:1] + 5]),
        jnp.concatenate([c.targets, c.targets[:1]]),
        jnp.append(weights, 0.0),
    )
    assert error(wide(f(c.params, *padded)), wide((value, grads))) <= 1e-12
    nothing = f(c.params, c.x, c.targets, jnp.zeros(len(c.x)))
    assert all((leaf == 0).all() for leaf in wide(nothing))


def test_the_manual_vjp_sits_inside_somebody_elses_grad(x64):
    c = case(6)
    f, weight = fnn.with_manual_vjp(c.net), jnp.asarray(1.7)

    def theirs(apply):
        return lambda params, x: (jnp.sin(weight * apply(params, x)) ** 2).sum()

    ours = jax.jit(jax.grad(theirs(f), argnums=(0, 1)))(c.params, c.x)
    reference = jax.jit(jax.grad(theirs(c.net.apply), argnums=(0, 1)))(c.params, c.x)
    assert error(wide(ours), wide(reference)) <= 1e-12
    manual = str(jax.make_jaxpr(jax.grad(theirs(f)))(c.params, c.x))
    with pytest.raises(TypeError, match=r"jvp|forward"):
        jax.jvp(lambda p: f(p, c.x), (c.params,), (c.params,))
    assert manual  # the jaxpr exists: nothing was left as a Python callback
    assert "callback" not in manual


def test_the_manual_vjp_of_an_embedding(x64):
    net = fnn.serial(fnn.embedding(5, 3), fnn.dense(3, 2))
    params, x = net.init(jax.random.key(0)), jnp.array([[1, 4], [4, 0]])
    ours = jax.grad(lambda p: (fnn.with_manual_vjp(net)(p, x) ** 2).sum())(params)
    assert (
        error(wide(ours), wide(jax.grad(lambda p: (net.apply(p, x) ** 2).sum())(params))) <= 1e-12
    )
