"""`rewire` against `jax.grad`, feedback alignment by its definition, and the nets of `fnn`."""

import re
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import error, wide
from jax import lax
from jax.extend.core import jaxprs_in_params

import fnn
from fnn.tracing.rewire import rewire

TANH = fnn.activations.tanh
MASK = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


# Every case is written once. `meet(f, w, x)` is where a parameter meets what depends on inputs.


class Pair(NamedTuple):
    """A parameter and its feedback."""

    w: Any
    b: Any


def plain(f, w, *x):
    return f(w, *x)


def feedback_alignment(f, pair, *x):
    """`f(w, *x)`, where the error of `x` goes back through `f(b, *x)`."""
    y = f(pair.w, *lax.stop_gradient(x))
    z = f(pair.b, *x)
    return y + z - lax.stop_gradient(z)


def dot(w, x):
    return x @ w


def add(b, x):
    return x + jnp.broadcast_to(b, x.shape)


def double(w):
    return jax.tree.map(lambda w: 2.0 * w, w)


@jax.custom_jvp
def leaky(a, x):
    return jnp.where(x > 0, x, a * x)


@leaky.defjvp
def leaky_jvp(primals, tangents):
    (a, x), (da, dx) = primals, tangents
    return leaky(a, x), jnp.sin(a) * da * x + jnp.cos(a) * dx  # wrong on purpose


@jax.custom_vjp
def scale(a, x):
    return a * x


scale.defvjp(
    lambda a, x: (a * x, (a, x)),
    lambda kept, dy: (3.0 * jnp.vdot(dy, kept[1]), dy * jnp.sin(kept[0])),  # wrong on purpose
)


def mlp(meet, p, x, numbers, key):
    h = jnp.tanh(meet(add, p["b"], meet(dot, p["w"], x)))
    return {"outputs": meet(dot, p["v"], h), "hidden": h}


def transposed(meet, p, x, numbers, key):
    h = jnp.tanh(meet(lambda w, x: w.T @ x, p["w"], x[0]))
    return meet(lambda w, x: w.T @ x, double(p["v"]), h)


def recurrent(meet, p, x, numbers, key):
    def step(h, row):
        h = jnp.tanh(meet(dot, p["w"], h) + meet(dot, p["v"], row))
        return h, h

    return lax.scan(step, jnp.zeros(3), x, reverse=True, unroll=2)


def stacked(meet, p, x, numbers, key):
    def step(h, w):
        return jnp.tanh(meet(dot, w, h)), double(w)

    h, ws = lax.scan(step, x, p["stack"])
    return meet(dot, jax.tree.map(lambda w: w[1], ws), h)


def params_in_the_carry(meet, p, x, numbers, key):
    def subtract_half(w, v):
        return jax.tree.map(lambda w, v: w - 0.5 * v, w, v)

    def step(carry, row):
        h, w, before, matrix = carry
        h = jnp.tanh(meet(dot, w, h) + meet(dot, before, row) + row @ matrix)
        matrix = meet(lambda w, x: w, p["w"], x)  # w itself, in the place of an input
        return (h, subtract_half(w, p["v"]), p["w"], matrix), None

    start = (x[0], p["w"], jax.tree.map(jnp.zeros_like, p["v"]), x[:3])
    (h, w, *_), _ = lax.scan(step, start, x)
    return meet(dot, w, h)


def branches(meet, p, x, numbers, key):
    def step(h, i):
        h = lax.cond(i == 0, lambda h: jnp.tanh(meet(dot, p["w"], h)), lambda h: h, h)
        on = [lambda h: meet(dot, p["v"], h), jnp.tanh, lambda h: meet(add, p["b"], h)]
        return lax.switch(numbers[i] + (h[0, 0] > 9).astype(jnp.int32), on, h), None

    return lax.scan(step, x, jnp.arange(3))[0]


def chosen_params(meet, p, x, numbers, key):
    def choose(h, w, v):
        return lax.cond(len(x) > 1, lambda: (w, h, v), lambda: (v, 2.0 * h, v))

    w, h, v = choose(x, p["w"], jax.tree.map(jnp.ones_like, p["v"]))
    return meet(dot, v, jnp.tanh(meet(dot, w, h)))


def params_chosen_by_inputs(meet, p, x, numbers, key):
    def choose(stack, x):
        return lax.cond(x[0, 0] > 0, lambda: stack[0], lambda: stack[1])

    return jnp.tanh(meet(dot, p["w"], x)) @ meet(choose, p["stack"], x)


def remat(meet, p, x, numbers, key):
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(p, h):
        return jnp.tanh(meet(dot, p["w"], h)), double(p["v"])

    def twice(p, x):
        h, v = block(p, block(p, x)[0])
        return meet(dot, v, h)

    return jax.jit(twice)(p, x)


def embedding(meet, p, x, numbers, key):
    h = meet(lambda table, i: table[i], p["w"], numbers)
    return meet(dot, p["v"], jnp.tanh(h * x[:3]))


def convolution(meet, p, x, numbers, key):
    def convolve(w, x):
        return lax.conv_general_dilated(x[None, None], w[:, None], (1, 1), "SAME")[0, 0]

    def kernel(w):
        return jax.tree.map(lambda w: w[None], w)

    return meet(convolve, kernel(p["w"]), jnp.tanh(meet(convolve, kernel(p["v"]), x)))


def weight_norm(meet, p, x, numbers, key):
    w, v = jax.tree.map(lambda w: MASK * w / jnp.linalg.norm(w), (p["w"], p["v"]))
    return meet(dot, v, jnp.tanh(meet(dot, w, x)))


def custom_jvp(meet, p, x, numbers, key):
    return meet(leaky, p["a"], meet(dot, p["w"], x))


def custom_vjp(meet, p, x, numbers, key):
    @jax.checkpoint
    def step(h, _):
        return jnp.tanh(meet(scale, p["a"], meet(dot, p["w"], h))), None

    return lax.scan(step, x, None, length=2)[0]


def keys_and_integers(meet, p, x, numbers, key):
    def sort(b, x):
        y, _, order = lax.sort((x, b, numbers), num_keys=1)
        return y * order.astype(x.dtype)

    def step(h, key):
        return jnp.tanh(meet(dot, p["w"], h)) + jax.random.normal(key, h.shape), None

    h, _ = lax.scan(step, x[0], jax.random.split(key, 2))
    return meet(sort, p["b"], meet(dot, p["v"], h))


CASES = (
    mlp,
    transposed,
    recurrent,
    stacked,
    params_in_the_carry,
    branches,
    chosen_params,
    params_chosen_by_inputs,
    remat,
    embedding,
    convolution,
    weight_norm,
    custom_jvp,
    custom_vjp,
    keys_and_integers,
)


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 3), "v": (3, 3), "stack": (2, 3, 3), "b": (3,), "a": ()}
    return {name: jax.device_put(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


def inputs():
    x = jax.device_put(np.random.default_rng(3).normal(size=(4, 3)))
    return x, jnp.array([1, 0, 2], jnp.int32), jax.random.key(0)


def sum_squares(outputs):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs))


def gradient(f, at):
    return jax.value_and_grad(lambda *args: sum_squares(f(*args)), at)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_derivative_is_that_of_feedback_alignment_and_with_the_params_that_of_jax(x64, case):
    def apply(p, *inputs):
        return case(lambda f, w, *x: f(w, *x), p, *inputs)

    def reference(p, feedback, *inputs):
        return case(feedback_alignment, jax.tree.map(Pair, p, feedback), *inputs)

    @jax.jit
    def run_all(p, feedback, *inputs):
        run = rewire(apply)
        true = gradient(apply, (0, 1))(p, *inputs)
        found = gradient(run, (0, 2))(p, p, *inputs)
        expected = gradient(reference, (0, 2))(p, feedback, *inputs)
        aligned = gradient(run, (0, 2))(p, feedback, *inputs)
        return true, found, expected, aligned

    results = run_all(draw(1), draw(2), *inputs())
    true, found, expected, aligned = map(wide, results)
    assert error(found, true) < 1e-12
    assert error(aligned, expected) < 1e-12
    assert error(aligned, true) > 1e-2


def dense(params, x):
    return x @ params.w + params.b


def plain_mlp(params, x):
    (first, _), (second, _), last = params
    return dense(last, jnp.tanh(dense(second, jnp.tanh(dense(first, x)))))


def plain_deep(params, x):
    first, _, blocks, (recurrent, _), last = params

    def block(x, params):
        norm, layer, _ = params
        centred = x - x.mean()
        normal = centred / jnp.sqrt((centred**2).mean() + 1e-6)
        y = norm.scale * normal + norm.bias
        return x + jnp.tanh(dense(layer, y)), None

    def step(_, x):
        return jnp.tanh(dense(recurrent, x))

    x, _ = lax.scan(block, jnp.tanh(dense(first, x)), blocks)
    return dense(last, lax.fori_loop(0, 3, step, x))


BLOCK = fnn.residual(fnn.serial(fnn.layer_norm(4), fnn.dense(4, 4), TANH))
RECURRENT = fnn.iterate(fnn.serial(fnn.dense(4, 4), TANH), 3)
DEEP = fnn.serial(fnn.dense(3, 4), TANH, fnn.repeat(BLOCK, 2), RECURRENT, fnn.dense(4, 2))
NETS = {"mlp": (fnn.mlp((3, 4, 4, 2), "tanh"), plain_mlp), "deep": (DEEP, plain_deep)}


@pytest.mark.parametrize("name", NETS)
def test_feedback_works_as_in_the_backward_pass_of_a_net(x64, name):
    net, apply = NETS[name]
    rng = np.random.default_rng(0)

    def draw_like(leaf):
        return jax.device_put(rng.normal(size=leaf.shape))

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params, feedback = (jax.tree.map(draw_like, shapes) for _ in range(2))
    x, dy = rng.normal(size=3), rng.normal(size=2)

    @jax.jit
    def run_both(params, feedback, x, dy):
        y, residuals = net.forward(params, x[None])
        expected = net.backward(feedback, residuals, dy[None])
        run = rewire(apply)
        found_y, pull_back = jax.vjp(lambda params, x: run(params, feedback, x), params, x)
        return (y[0], expected[0], expected[1][0]), (found_y, *pull_back(dy))

    expected, found = run_both(params, feedback, x, dy)
    assert error(wide(found), wide(expected)) < 1e-12


def test_forward_mode_is_the_transpose_of_reverse_mode(x64):
    x, *rest = inputs()
    run = rewire(lambda p, x: recurrent(plain, p, x, *rest)[0])
    p, feedback, dp = draw(1), draw(2), draw(3)
    dx, dy = jnp.cos(x), jnp.arange(3.0)
    _, pull_back = jax.vjp(lambda p, x: run(p, feedback, x), p, x)
    _, tangent = jax.jvp(lambda p, x: run(p, feedback, x), (p, x), (dp, dx))
    products = jax.tree.map(jnp.vdot, pull_back(dy), (dp, dx))
    assert abs(float(sum(jax.tree.leaves(products)) - tangent @ dy)) < 1e-12


def test_feedback_has_no_gradient_and_inputs_may_be_mapped(x64):
    x, *rest = inputs()
    run = rewire(lambda p, x: mlp(plain, p, x, *rest))
    p, feedback = draw(1), draw(2)
    alone = [wide(gradient(run, 0)(p, feedback, row)) for row in x]
    mapped = jax.vmap(gradient(run, 0), (None, None, 0))(p, feedback, x)
    assert error(wide(mapped), [np.stack(leaves) for leaves in zip(*alone, strict=True)]) < 1e-12
    assert not any(leaf.any() for leaf in wide(gradient(run, 1)(p, feedback, x)[1]))


def count(jaxpr):
    """How often every primitive is in a jaxpr."""
    counts = Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            counts += count(inner)
    return counts


@pytest.mark.parametrize("case", [recurrent, remat, branches], ids=lambda case: case.__name__)
def test_program_is_as_long_as_that_of_backprop(case):
    x, *rest = inputs()

    def apply(p, x):
        return case(plain, p, x, *rest)

    p = draw(1)
    expected = count(jax.make_jaxpr(gradient(jax.jit(apply), 0))(p, x).jaxpr)
    found = count(jax.make_jaxpr(gradient(jax.jit(rewire(apply)), 0))(p, p, x).jaxpr)
    kept = ("dot_general", "tanh", "scan", "cond", "remat2", "add")
    assert {name: found[name] for name in kept} == {name: expected[name] for name in kept}
    settings = r"(?:length|reverse|unroll|prevent_cse)=\w+"
    program = str(jax.make_jaxpr(rewire(apply))(p, p, x))
    assert re.findall(settings, program) == re.findall(settings, str(jax.make_jaxpr(apply)(p, x)))


def test_calls_that_mix_nothing_and_loops_without_an_end_stay_as_they_are(x64):
    def apply(p, x):
        y = lax.while_loop(lambda c: c[1] < 2, lambda c: (p["w"] @ c[0], c[1] + 1), (x[0], 0))[0]
        return lax.stop_gradient(y) + jax.checkpoint(jnp.tanh)(scale(x[0, 0], x[1])), p["w"]

    p, (x, *_) = draw(1), inputs()
    run = rewire(apply)
    (y, w), grads = run(p, p, x), gradient(run, (0, 2))(p, p, x)[1]
    np.testing.assert_allclose(y, p["w"] @ p["w"] @ x[0] + jnp.tanh(x[0, 0] * x[1]), rtol=1e-12)
    assert error([np.asarray(w)], [np.asarray(p["w"])]) == 0
    assert error(wide(grads), wide(gradient(apply, (0, 1))(p, x)[1])) < 1e-12
    assert "remat2" in str(jax.make_jaxpr(run)(p, p, x))


def test_gradient_inside_a_function_is_gone_into(x64):
    policy = jax.checkpoint_policies.dots_saveable

    def apply(p, x):
        @partial(jax.checkpoint, policy=policy)
        def run(x):
            return lax.scan(lambda h, row: (jnp.tanh(p["w"] @ h + row), None), x[0], x)[0]

        return x - jax.grad(lambda x: sum_squares(run(x)))(x)

    p, (x, *_) = draw(1), inputs()
    rewired = rewire(apply)
    assert count(jax.make_jaxpr(apply)(p, x).jaxpr)["closed_call"] == 1
    assert count(jax.make_jaxpr(rewired)(p, p, x).jaxpr)["closed_call"] == 0
    expected = gradient(apply, (0, 1))(p, x)
    assert error(wide(gradient(rewired, (0, 2))(p, p, x)), wide(expected)) < 1e-12


WRONG = {
    "shape": ({"w": jnp.zeros((2, 3))}, r"`feedback\['w'\]` must be float32\[3, 2\].*got .*2, 3"),
    "dtype": ({"w": jnp.zeros((3, 2), int)}, r"`feedback\['w'\]` must be float32.*got int32"),
    "missing": ({}, r"`feedback\['w'\]` must be float32\[3, 2\] .* got no array"),
    "more": ({"w": jnp.zeros((3, 2)), "v": 1.0}, r"`feedback\['v'\]` must be no array .* float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_feedback_of_another_tree_raises(name):
    feedback, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        rewire(lambda p, x: p["w"] @ x)({"w": jnp.zeros((3, 2))}, feedback, jnp.ones(2))


def test_feedback_of_another_container_and_a_model_that_is_no_function_raise():
    with pytest.raises(
        ValueError, match=r"`feedback` must be a tree like `params`, .*\[\*\].*got .*\(\*,\)"
    ):
        rewire(lambda p, x: p[0] * x)([1.0], (1.0,), 2.0)
    with pytest.raises(TypeError, match="`apply` must be a function"):
        rewire(3)
