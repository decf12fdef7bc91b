"""The computational graph: its sweeps against JAX, what it prints and what it draws."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide
from jax import lax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import fnn
from fnn import graph
from fnn.graph import GATES, draw


def close(ours, truth):
    """Two trees are equal to 1e-12 of the size of the true one."""
    assert jax.tree.structure(ours) == jax.tree.structure(truth)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert jnp.shape(a) == jnp.shape(b)
        assert jnp.result_type(a) == jnp.result_type(b)
        if jnp.result_type(b) != jax.dtypes.float0:
            size = max(1.0, float(np.abs(b).max(initial=0)))
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13 * size)


def agrees(f, *args):
    """Value, gradient and tangent are JAX's; returns the graph."""
    g = graph.trace(f, *args)
    close(g.value, jax.tree.map(jnp.asarray, f(*args)))
    close(g.gradients(), jax.grad(f, tuple(range(len(args))), allow_int=True)(*args))
    rng = np.random.default_rng(0)

    def draw_tangent(a):
        if jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return jnp.asarray(rng.normal(size=jnp.shape(a)))
        return np.zeros(jnp.shape(a), jax.dtypes.float0)

    tangents = jax.tree.map(draw_tangent, args)
    close(g.jvp(*tangents), jax.jvp(f, args, tangents)[1])
    return g


# Gates

A, B = np.random.default_rng(0).uniform(0.3, 0.9, (2, 3, 4))
UNARY_GATES = (
    "exp exp2 log log1p expm1 sin cos tan sinh cosh tanh atan logistic erf sqrt rsqrt square "
    "abs neg sign floor ceil round"
)
BINARY_GATES = ("add", "sub", "mul", "div", "max", "min", "pow")
ON = {
    **{name: (getattr(lax, name), (A,)) for name in UNARY_GATES.split()},
    **{name: (getattr(lax, name), (A, B)) for name in BINARY_GATES},
    "abs": (lax.abs, (A - 0.5,)),
    "add_any": (lambda a, b: jax.vjp(lambda x: (x, x), a)[1]((a, b))[0], (A, B)),
    "integer_pow": (lambda a: sum(lax.integer_pow(a, n) for n in (-3, 0, 1, 2, 3)), (A,)),
    "select_n": (lambda a, b: lax.select_n(jnp.asarray(A > 0.5), a, b), (A, B)),
    "dot_general": (lambda a, b: a @ b, (A, B.T)),
    "reduce_sum": (lambda a: a.sum(0), (A,)),
    "reduce_max": (lambda a: a.max(1), (np.round(A, 1),)),  # with ties
    "reduce_min": (lambda a: a.min((0, 1)), (np.round(A, 1),)),
    "broadcast_in_dim": (lambda a: lax.broadcast_in_dim(a, (2, 3, 5, 4), (1, 2, 3)), (A[:, None],)),
    "reshape": (lambda a: a.reshape(2, 6), (A,)),
    "squeeze": (lambda a: lax.squeeze_p.bind(a, dimensions=(1,)), (A[:, None],)),
    "transpose": (lambda a: jnp.transpose(a, (2, 0, 1)), (A[None],)),
    "slice": (lambda a: lax.slice(a, (0, 1), (3, 4), (2, 2)), (A,)),
    "convert_element_type": (lambda a: a.astype(jnp.float32).astype(float), (np.round(A * 8) / 8,)),
    "copy": (lambda a: lax.copy_p.bind(a), (A,)),
    "stop_gradient": (lambda a: lax.stop_gradient(a) * a, (A,)),
}


@pytest.mark.parametrize("name", [*GATES, "integer_pow"])
def test_every_gate_has_the_derivative_of_jax(x64, name):
    f, args = ON[name]
    size = np.size(f(*args))
    weights = jnp.cos(jnp.arange(size)).reshape(np.shape(f(*args)))  # no two entries weigh the same
    g = agrees(lambda *args: (f(*args) * weights).sum(), *map(jnp.asarray, args))
    assert name in {node.primitive for node in g.nodes}
    assert "vjp of" not in str(g)


@pytest.mark.parametrize(
    ("f", "x", "y"), [(jnp.maximum, 2.0, 2.0), (jnp.minimum, 2.0, 2.0), (jnp.hypot, 3.0, 4.0)]
)
def test_a_tie_shares_equally(x64, f, x, y):
    agrees(f, x, y)


@pytest.mark.parametrize("name", BINARY_GATES)
@pytest.mark.parametrize(
    "shapes", [((3, 2), (1, 2)), ((3, 1), (1, 2)), ((1, 1), (3, 2)), ((3, 2), ())], ids=str
)
def test_what_is_copied_to_meet_more_entries_gets_the_sum(x64, name, shapes):
    """JAX's primitives copy numbers and axes of size 1 themselves."""
    args = [
        jnp.asarray(np.random.default_rng(i).uniform(1, 2, shape)) for i, shape in enumerate(shapes)
    ]
    weights = jnp.cos(jnp.arange(6.0)).reshape(3, 2)
    agrees(lambda a, b: (getattr(lax, name)(a, b) * weights).sum(), *args)


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_a_whole_power_at_zero(x64, power):
    agrees(lambda x: lax.integer_pow(x, power), 0.0)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own derivative of `pow` needs that
        agrees(lambda x: lax.pow(x, jnp.int32(power)), 0.0)


def test_the_gradient_of_tanh_is_accurate_where_it_saturates():
    found = graph.trace(jnp.tanh, jnp.float32(8.0)).gradients()[0]
    np.testing.assert_allclose(found, 1 / np.cosh(8.0) ** 2, rtol=1e-5)  # JAX's is 20 % off


# Generated expressions

FAMILIES = (
    (
        jnp.sin,
        jnp.cos,
        jnp.tanh,
        jnp.exp,
        jnp.abs,
        jnp.square,
        jax.nn.sigmoid,
        jax.nn.softplus,
        jax.nn.gelu,
        jax.nn.relu,
        lambda a: jnp.log(1.5 + a * a),
        lambda a: jnp.sqrt(1 + a * a),
        lambda a: 1 / (2 + jnp.cos(a)),
        lambda a: a**3,
        lambda a: -a,
        lambda a: jnp.log1p(jnp.abs(a)),
        lambda a: jnp.expm1(jnp.tanh(a)),
        lambda a: jnp.where(a > 0, a, 0.1 * a),
        lambda a: lax.rsqrt(2 + a * a),
    ),
    (
        jnp.add,
        jnp.subtract,
        jnp.multiply,
        jnp.maximum,
        jnp.minimum,
        lambda a, b: a / (2 + b * b),
        lambda a, b: (1 + a * a) ** jnp.tanh(b),
    ),
    (
        jax.nn.softmax,
        jnp.flip,
        lambda a: a - a.max(),
        lambda a: jnp.concatenate([a[1:], a[:1]]),
        lambda a: a * jax.nn.logsumexp(a),
        lambda a: jnp.outer(a, a).sum(1),
        jnp.sort,
        jnp.cumsum,
        lambda a: a.reshape(2, 2).T.reshape(4),
    ),
)


def expression(number):
    """A function of two or three scalars or arrays `[4]` that reuses its results, and a point."""
    rng = np.random.default_rng(number)
    count, array = int(rng.integers(2, 4)), bool(number % 2)
    length = rng.integers(3, 13)
    steps = [(rng.integers(3 if array else 2), *rng.integers(1000, size=3)) for _ in range(length)]

    def f(*xs):
        known = list(xs)
        for kind, op, i, j in steps:
            a, b = known[i % len(known)], known[j % len(known)]
            family = FAMILIES[kind]
            known.append(family[op % len(family)](*((a, b) if kind == 1 else (a,))))
        return sum(jnp.tanh(k).sum() for k in known[len(xs) :])

    return f, [jnp.asarray(rng.normal(size=(4,) if array else ())) for _ in range(count)]


@pytest.mark.parametrize("first", range(0, 120, 10))
def test_generated_expressions_agree_in_both_modes(x64, first):
    for number in range(first, first + 10):
        f, xs = expression(number)
        agrees(f, *xs)


# The lectures


def circuit(x1, x2, x3):
    z1 = x1**2
    z2 = x2 * x3
    z3 = 2 * z1
    z4 = z2 - z3
    return z1 * z4


def test_the_example_of_lecture_003(x64):
    g = agrees(circuit, 1.0, 2.0, 3.0)
    assert float(g.value) == 4
    assert [float(d) for d in g.gradients()] == [4, 3, 2]
    values = {node.name: float(node.value) for node in g.nodes}
    assert [values[z] for z in ("z₁", "z₂", "z₃", "z₄", "z₅")] == [1, 6, 2, 4, 4]
    adjoint = {node.name: float(d) for node, d in g.sweep().gradients.items()}
    assert [adjoint[z] for z in ("z₄", "z₃", "z₂", "z₁")] == [1, -1, 1, 2]
    assert [float(g.jvp(*unit)) for unit in np.eye(3)] == [4, 3, 2]
    assert "∂z₁ = ∂z₅ · z₄ + ∂z₃ · 2 = 4 + (-2) = 2   copy adds" in str(g)


def test_the_example_of_lecture_000(x64):
    g = agrees(lambda x1, x2: x1 * x2 + jnp.sin(x1), 2.0, 5.0)
    np.testing.assert_allclose(g.value, 10.909297, atol=5e-7)
    np.testing.assert_allclose(g.gradients(), (4.583853, 2), atol=5e-7)


def test_the_examples_of_lecture_002(x64):
    g = agrees(lambda x, w0, w1: 1 + jnp.exp(w0 + w1 * x), 0.5, 1.0, -2.0)
    assert float(g.value) == 2
    assert [float(d) for d in g.gradients()] == [-2, 1, 0.5]

    def neuron(w0, w1, w2, x0, x1):
        return 1 / (1 + jnp.exp(-(w0 * x0 + w1 * x1 + w2)))

    g = agrees(neuron, 2.0, -3.0, -3.0, -1.0, -2.0)
    np.testing.assert_allclose(g.value, 0.731059, atol=5e-7)
    expected = (-0.1966, -0.3932, 0.1966, 0.3932, -0.5898)
    np.testing.assert_allclose(g.gradients(), expected, atol=1e-4)


def test_the_words_of_the_gates():
    printed = str(graph.trace(lambda a, b, c: jnp.maximum(a + b, b * c), 1.0, 2.0, 4.0))
    for line in (
        "∂b = ∂z₂ · c + ∂z₁ = 4 + 0 = 4   copy adds",
        "∂a = ∂z₁ = 0   add distributes",
        "∂c = ∂z₂ · b = 2   mul swaps the multipliers",
        "∂z₂ = ∂z₃ · [z₂ is larger] = 1   max routes to the larger; a tie shares equally",
    ):
        assert f"  {line}\n" in printed + "\n"


def test_the_chain_rule_and_the_total_derivative(x64):
    """df(g(x))/dx = f'(g(x)) g'(x); and d/dt f(g_1(t), g_2(t)) = sum_i D_i f dg_i/dt."""
    x, t = 0.7, 0.4
    slope = agrees(lambda x: jnp.sin(jnp.exp(x)), x).gradients()[0]
    np.testing.assert_allclose(slope, np.cos(np.exp(x)) * np.exp(x), rtol=1e-14)
    f = graph.trace(lambda a, b: a * a * b, np.cos(t), np.sin(t))
    partial, inner = f.gradients(), (-np.sin(t), np.cos(t))
    total = partial[0] * inner[0] + partial[1] * inner[1]
    np.testing.assert_allclose(total, f.jvp(*inner), rtol=1e-14)
    slope = agrees(lambda t: jnp.cos(t) ** 2 * jnp.sin(t), t).gradients()[0]
    np.testing.assert_allclose(total, slope, rtol=1e-14)


# Four ways to differentiate


def test_x_squared_at_three_by_four_ways(x64):
    d = graph.derivatives(lambda x: x**2, 3.0)
    assert d.formulas == ["2*x"]
    assert d.symbolic[0] == d.forward[0] == d.reverse[0] == 6
    np.testing.assert_allclose(d.numeric, 6, rtol=1e-10)


def test_four_ways_side_by_side(x64):
    d = graph.derivatives(lambda x1, x2: x1 * x2 + jnp.sin(x1), 2.0, 5.0)
    assert d.formulas == ["x₂ + cos(x₁)", "x₁"]
    for way in (d.symbolic, d.forward, d.reverse):
        np.testing.assert_allclose(way, (4.583853163452858, 2), rtol=1e-14)
    np.testing.assert_allclose(d.numeric, d.reverse, rtol=1e-9)
    # too long a step truncates, too short a one rounds
    assert d.errors.argmin() not in (0, len(d.errors) - 1)
    assert str(d).split()[:4] == ["symbolic", "numeric", "forward", "reverse"]


def test_four_ways_of_an_array(x64):
    d = graph.derivatives(lambda x: (x * x).sum(), jnp.array([3.0, -1.0]))
    assert d.symbolic is None
    assert d.names == ["x[0]", "x[1]"]
    for way in (d.forward, d.reverse):
        np.testing.assert_array_equal(way, [6, -2])
    np.testing.assert_allclose(d.numeric, [6, -2], rtol=1e-8)
    assert "symbolic" not in str(d)


FORMULAS = [
    lambda x, y: jnp.tanh(jnp.sin(x * y) + jnp.exp(x) / (1 + y**2)) * jnp.log(1 + x * x),
    lambda x, y: jnp.maximum(x, 2 * y) - jnp.minimum(x, y) + jnp.abs(x - y),
    lambda x, y: x**y + y**0 + y**-2 + jax.nn.sigmoid(x) + lax.rsqrt(y),
    lambda x, y: x * (1 + 1e-13) - x + 0.1 * y,
]


@pytest.mark.parametrize("f", FORMULAS)
def test_symbolic_derivatives_are_those_of_the_sweep(x64, f):
    d = graph.derivatives(f, 0.3, 0.7)
    np.testing.assert_allclose(d.symbolic, d.reverse, rtol=1e-12, atol=1e-15)


def test_a_formula_without_a_value_gives_nan(x64):
    assert np.isnan(graph.derivatives(jnp.sqrt, 0.0).symbolic).all()


def deep(x):
    z = x
    for _ in range(16):
        z = jnp.sin(z) * jnp.cos(z) + x  # written out, 2^16 terms
    return z


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (lambda x: jnp.floor(x) * x, (2.5,)),
        (lambda x: x.astype(int).astype(float) * x, (2.7,)),
        (lambda x: x.sum() ** 2, (np.array([1.0, 2.0]),)),
        (lambda x, k: x * x, (2.7, np.ones(2))),
        (lambda x: 3.0, (2.7,)),
        (deep, (0.3,)),
    ],
)
def test_no_symbolic_derivative_where_there_is_none(x64, f, args):
    assert graph.derivatives(f, *args).symbolic is None


# Functions as they are


def net_case():
    net, loss = fnn.mlp((3, 4, 2), "gelu"), fnn.losses.softmax_cross_entropy_with_integer_labels
    params = net.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), params[-1].w.dtype)
    return net, loss, params, x, jnp.arange(5) % 2


def test_a_training_step_is_traced_unchanged(x64):
    net, loss, params, x, t = net_case()
    step = fnn.value_and_grad(net, loss)
    g = graph.trace(step, params, x, t)
    close(g.value, step(params, x, t))
    agrees(lambda params, x, t: step(params, x, t)[0], params, x, t)
    # the gradient of the gradient
    _, pull = jax.vjp(lambda params, x: step(params, x, t), params, x)
    cotangent = (jnp.ones(()), jax.tree.map(jnp.ones_like, params))
    close(g.gradients(cotangent)[:2], pull(cotangent))
    assert "no sweep backward: `f` returns float64[], float64[3, 4]" in str(g)


FUNCTIONS = [
    jax.nn.gelu,
    jax.nn.softmax,
    jax.nn.logsumexp,
    jax.nn.relu,
    jax.nn.log_softmax,
    jax.nn.silu,
    jnp.linalg.norm,
    jnp.convolve,
    jnp.cumsum,
    jnp.prod,
    jnp.std,
    jnp.sort,
    lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2,  # complex numbers on the way
    lambda x: jnp.linalg.det(jnp.outer(x, x) + jnp.eye(3)),
    lambda x: jnp.linalg.inv(jnp.diag(x) + 0.1),
    lambda x: x.at[1].set(x[0] ** 2)[1] + x[::2].sum(),
    lambda x: jax.checkpoint(lambda a: jnp.sin(jnp.exp(a)))(x),
    lambda x: lax.cond(x[0] > 0, lambda a: (a**2).sum(), lambda a: a.sum(), x),
    lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * x.sum(), x[0]),
    lambda x: jax.grad(lambda a: (a**3).sum())(x) * x,
    lambda x: jax.vmap(lambda a: jnp.sin(a) * x.sum())(x),
    lambda x: jnp.einsum("i,j,ij->", x, x, jnp.outer(x, x)),
    lambda x: jnp.stack([x, x * x]) @ x,
    lambda x: jnp.einsum("bij,bjk->bik", jnp.ones((2, 1, 3)) * x[0], jnp.ones((2, 3, 1)) * x[1]),
    lambda x: lax.select_n(jnp.array([0, 1, 2], jnp.int32), x, x * x, x**3),
]


@pytest.mark.parametrize("f", FUNCTIONS)
def test_whatever_jax_differentiates(x64, f):
    def weigh(x):
        y = f(x, x) if f is jnp.convolve else f(x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    g = agrees(weigh, jnp.array([0.3, -1.2, 2.0]))
    assert str(g)
    assert g.to_dot()


def test_a_scan_is_one_node_for_each_output(x64):
    def f(x):
        last, before = lax.scan(lambda c, a: (jnp.sin(c) * a, c), x[0], x)
        return last + before.sum()

    g = agrees(f, jnp.array([0.5, 1.5, 2.5]))
    assert "z₄ = scan[1](z₂, x)" in str(g)
    assert "vjp of scan[0] at ∂z₃" in str(g)


def test_a_while_loop_goes_forward_only(x64):
    def f(x):
        return lax.while_loop(lambda c: c < 10, lambda c: c * x, x)

    g = graph.trace(f, 2.0)
    assert float(g.jvp(1.0)) == float(jax.jvp(f, (2.0,), (1.0,))[1])
    with pytest.raises(TypeError, match=r"`while` .* cannot be differentiated backward; perhaps"):
        g.gradients()
    assert "no sweep backward: `while`" in str(g)


def custom(f, backward, name="own"):
    """A function whose derivative is another than its own."""
    g = jax.custom_vjp(f)
    f.__name__ = g.__name__ = name
    g.defvjp(lambda x: (f(x), x), backward)
    return g


@jax.custom_jvp
def safe_root(x):
    """The root of what is above 0, without the infinite slope at 0 that its inside has."""
    return jnp.where(x > 0, jnp.sqrt(x), 0.0)


@safe_root.defjvp
def _safe_root_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return safe_root(x), jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0) * t


def root(a):
    """By Newton's method."""
    return lax.while_loop(lambda c: abs(c * c - a) > 1e-9, lambda c: 0.5 * (c + a / c), a)


OWN = {
    "passes a step": (custom(lambda x: jnp.round(x), lambda x, g: (g,)), 0.4),
    "clips": (custom(lambda x: x * 1, lambda x, g: (jnp.clip(g, -1, 1),)), np.array([0.4, 2.0])),
    "reverses": (custom(lambda x: x * 1, lambda x, g: (g[::-1],)), np.ones(5)),
    "has a gate's name": (custom(jnp.floor, lambda x, g: (g,), "floor"), 0.4),
    "is implicit": (custom(root, lambda a, g: (g / 2 / a**0.5,)), 2.0),
    "relu at 0": (jax.nn.relu, 0.0),
    "safe root": (safe_root, 0.0),
    "log1mexp": (jax.nn.log1mexp, 0.0),
}


@pytest.mark.parametrize("name", OWN)
def test_a_derivative_of_its_own_counts(x64, name):
    own, x = OWN[name]

    def f(x):
        return (jnp.arange(1.0, 1 + np.size(x)).reshape(np.shape(x)) * own(x)).sum()

    g = graph.trace(f, jnp.asarray(x))
    np.testing.assert_allclose(g.gradients()[0], jax.grad(f)(jnp.asarray(x)), rtol=1e-12)
    assert f"vjp of {own.__name__} at" in str(g)


def test_the_manual_backward_of_a_net_is_used(x64):
    net = fnn.mlp((3, 2), "relu")

    def f(params):
        return fnn.with_manual_vjp(net)(params, jnp.ones((2, 3))).sum()

    params = net.init(jax.random.key(0))
    close(graph.trace(f, params).gradients()[0], jax.grad(f)(params))


def test_keys_and_prints_do_not_disturb(x64):
    def f(x, key):
        jax.debug.print("{x}", x=x)
        return (x * jax.random.normal(key, (3,))).sum()

    g = agrees(f, jnp.arange(3.0), jax.random.key(0))
    assert g.gradients()[1].dtype == jax.dtypes.float0
    assert "key" in str(g)
    assert g.to_dot()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_short_dtypes_are_kept(dtype):
    net, loss, params, x, t = net_case()
    f = fnn.mean_loss(net, loss)
    args = (cast(params, dtype), x.astype(dtype), t)
    ours, truth = graph.trace(f, *args).gradients()[0], jax.grad(f)(*args)
    assert jax.tree.map(lambda a: a.dtype, ours) == jax.tree.map(lambda a: a.dtype, truth)
    assert error(wide(ours), wide(truth)) <= 8 * float(jnp.finfo(dtype).eps)


def test_a_graph_keeps_the_precision_that_it_was_traced_in():
    with jax.enable_x64(True):
        g = graph.trace(lambda x, y: x**3 + jnp.zeros(2).sum(), 1.1, 2.0)
        gradient, text = g.gradients(), str(g)
    close(g.gradients(), gradient)
    assert gradient[0].dtype == gradient[1].dtype == g.jvp(1.0, 0.0).dtype == np.float64
    assert str(g) == text


NOT_WANTED = [  # 0 x inf, and what need not be differentiated
    (lambda x: 0.5 * x, jnp.inf),
    (lambda x: 2 * jnp.exp(x), 1000.0),
    (lambda x: jnp.power(x, jnp.array(2.0)), -1.0),
    (lambda x: lax.stop_gradient(jnp.sqrt(x)) + x, 0.0),
    (lambda x: jnp.floor(jnp.sqrt(x)) + jnp.round(jnp.sqrt(x)) + x, 0.0),
    (lambda x: x * lax.stop_gradient(lax.while_loop(lambda c: c < 10, lambda c: c * 2, x)), 1.5),
    (lambda x: x * lax.while_loop(lambda c: c < 10, lambda c: c * 2, jnp.asarray(1.5)), 1.5),
    (lambda x: jnp.linalg.eigvalsh(x).sum() + jnp.linalg.svd(x)[1].sum(), np.eye(3)),
    (lambda x: jnp.abs(x).sum(), np.zeros(2)),
]


@pytest.mark.parametrize(("f", "x"), NOT_WANTED)
def test_what_is_not_wanted_is_not_computed(x64, f, x):
    agrees(f, jnp.asarray(x))


def test_names_are_unique():
    g = graph.trace(lambda z1, z2: z1 * z2 + jnp.sin(z1), 2.0, 3.0)
    assert [node.name for node in g.nodes] == ["z₁", "z₂", "z₃", "z₄", "z₅"]


def test_what_the_result_does_not_depend_on_is_not_there():
    g = graph.trace(lambda x, y: (jnp.sin(x), jnp.cos(y) * 2)[0], 1.0, 2.0)
    assert [node.name for node in g.nodes] == ["x", "y", "z₁"]
    assert float(g.gradients()[1]) == 0


def test_what_depends_on_no_argument_is_a_constant():
    g = graph.trace(lambda x: x * jnp.sin(jnp.ones(2)).sum() + 3, 2.0)
    assert [node.primitive for node in g.nodes] == ["input", "mul", "add"]
    assert "  3 = 3   the result" in str(graph.trace(lambda x: 3.0, 1.0))


def test_an_argument_that_is_the_result():
    g = graph.trace(lambda x: x, 2.0)
    assert (float(g.value), float(g.gradients()[0]), float(g.jvp(3.0))) == (2, 1, 3)
    assert "∂x = 1" in str(g)


def test_cotangents_are_those_of_jax(x64):
    x = jnp.array([1.0, 2.0])
    found = graph.trace(lambda x: x**2, x).gradients(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(found[0], [0, 4])
    c = jnp.array([1 + 2j, 3.0])
    close(graph.trace(jnp.fft.fft, x).gradients(c), jax.vjp(jnp.fft.fft, x)[1](c))
    found = graph.trace(lambda x: (x, x, jnp.argmax(x)), x).gradients((x, x, 0))
    np.testing.assert_array_equal(found[0], 2 * x)


PRINTED = [
    (lambda x: (x * 2.0).sum(), np.ones(3), "z₁ = x · 2 = [3] |3.464|"),
    (lambda x: -x, np.array([np.inf, 1.0]), "z₁ = -x = [2] |inf|"),
    (lambda x: (x * x[0]).sum(), np.arange(3.0) + 1, "∂z₂ = sum of ∂z₃ · x = 6"),
    (lambda x: jnp.where(x > 0, x**-3, x), 2.7, "z₃ = where(z₁, z₂, x)"),
    (lambda x: jnp.where(x > 0, x**-3, 0.0), 2.7, "∂x = ∂z₂ · (-3) · x^(-4) = -0.0564503"),
    (lambda x: -x / (1 - x), 2.0, "∂z₂ = ∂z₃ · (-z₁ / z₂^2) = 2"),
    (lambda x: (x @ x.T).sum(), np.ones((2, 3)), "∂z₁ = xᵀ @ ∂z₂ = [3, 2] |4.899|"),
    (lambda x: jnp.sqrt(x) / x, 4.0, "∂x = ∂z₂ · (-z₁ / x^2) + ∂z₁ / (2 · sqrt(x)) ="),
    (lambda x: x * x.astype(int).astype(float), 2.7, "z₁ = cast(x) = 2"),
]


@pytest.mark.parametrize(("f", "x", "line"), PRINTED, ids=[line for *_, line in PRINTED])
def test_what_is_printed_is_what_is_computed(f, x, line):
    assert f"  {line}" in str(graph.trace(f, jnp.asarray(x, jnp.float32)))


# Bad input


def branch(x):
    return x if x > 0 else -x


def trace(f, *args):
    return lambda: graph.trace(f, *args)


BAD = [
    (trace(3, 1.0), "`f` must be a function of arrays"),
    (trace(branch, 1.0), r"Python `if` or `while`.*Write `jnp.where` or `jax.lax.cond`"),
    (trace(lambda x: jnp.asarray(np.sin(x)), 1.0), r"or in NumPy.*use `jax.numpy`"),
    (trace(lambda x: float(x) * 2, 1.0), "as a Python number"),
    (trace(lambda x, n: sum(x for _ in range(n)), 2.0, 3), r"close over .* `lambda x: f\(x, 3\)`"),
    (trace(lambda x: x[x > 0].sum(), jnp.ones(3)), "close over what is fixed"),
    (trace(lambda x: x, {"w": [None, "a"]}), r"`x\['w'\]\[1\]` must hold numbers.*got <U1"),
    (trace(lambda x: x, np.array(["2020-01-01"], "M8[D]")), "`x` must hold numbers.*datetime64"),
    (trace(lambda x, y: x, 1.0), "missing a required argument: 'y'"),
    (trace(lambda x: None, 1.0), "`f` returns no array"),
    (trace(lambda x1, x2: x1 * x2 + jnp.sin(x1), 2, 5), r"`x₁` holds whole numbers .*Pass floats"),
    (lambda: graph.trace(lambda x: x * x, 3).gradients(), r"returns int32\[\].*Pass floats"),
    (lambda: graph.trace(lambda x: (x, x), 1.0).gradients(), r"returns float32\[\], float32\[\],"),
    (lambda: graph.trace(jnp.cos, jnp.ones(3)).gradients(), r"returns float32\[3\], not one"),
    (
        lambda: graph.trace(jnp.cos, jnp.ones(3)).gradients(jnp.ones(2)),
        r"`cotangent` must .*\(2,\)",
    ),
    (lambda: graph.trace(jnp.cos, 1.0).gradients((1.0,)), r"`cotangent` must have the structure"),
    (lambda: graph.trace(jnp.cos, jnp.ones(3)).jvp(1.0), r"`tangents` must .*\(3,\)"),
    (lambda: graph.trace(jnp.cos, 1.0).jvp(), "`tangents` must have the structure"),
    (lambda: graph.derivatives(lambda x: x * 2, jnp.ones(3)), "not one floating-point number"),
    (lambda: graph.derivatives(lambda n: jnp.ones(3)[n], 1), "`n` holds int32, expected floating"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_a_clear_error(call, message):
    with pytest.raises(TypeError, match=re.compile(message, re.DOTALL)):
        call()


# Pictures


def test_dot_has_value_and_gradient_on_every_edge():
    text = graph.trace(circuit, 1.0, 2.0, 3.0).to_dot()
    assert text.count("->") == 8
    assert text.count(draw.VALUE) == text.count(draw.GRADIENT) == 8
    assert "label=<z₃: 2 ×>" in text
    assert "label=<x₁ = 1>" in text


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_picture_is_drawn(tmp_path, suffix):
    net, loss, params, x, t = net_case()
    g = graph.trace(fnn.value_and_grad(net, loss), params, x, t)
    file = g.draw(tmp_path / f"step.{suffix}")
    assert file.stat().st_size > 5000


@pytest.mark.parametrize("f", [lambda x: x, lambda x: 3.0, lambda x: x * x])
def test_small_graphs_are_drawn(tmp_path, f):
    assert graph.trace(f, 2.0).draw(tmp_path / "g.png").exists()


def layouts():
    net, loss, params, x, t = net_case()
    yield graph.trace(fnn.value_and_grad(net, loss), params, x, t)
    yield graph.trace(circuit, 1.0, 2.0, 3.0)


def test_edges_go_one_column_to_the_right_at_a_time():
    for g in layouts():
        edges = draw._find_edges(g)
        columns, paths = draw._find_columns(g.nodes, edges)
        column = {point: number for number, points in columns.items() for point in points}
        for edge, path in zip(edges, paths, strict=True):
            assert (path[0], path[-1]) == (edge.start, edge.end)
            assert all(column[b] == column[a] + 1 for a, b in itertools.pairwise(path))


def test_points_of_a_column_stand_a_row_apart():
    for g in layouts():
        columns, paths = draw._find_columns(g.nodes, draw._find_edges(g))
        rows = draw._find_rows(columns, paths)
        for points in columns.values():
            heights = sorted(rows[point] for point in points)
            assert all(b - a >= 0.99 for a, b in itertools.pairwise(heights))


def test_labels_do_not_lie_on_their_edge():
    """The text's middle is off the line by more than half its height."""
    g = graph.trace(circuit, 1.0, 2.0, 3.0)
    picture = draw.arrange(g)
    fig = Figure(figsize=picture.size)
    FigureCanvasAgg(fig)
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.size[0]), ylim=(picture.size[1], 0))
    steepest = max(picture.lines, key=lambda line: abs(line[1][1][1] - line[1][0][1]))
    draw.paint(axes, g, picture._replace(boxes={}, lines=[steepest]))
    (x0, y0), (x1, y1) = (axes.transData.transform(point) for point in steepest[1][:2])
    normal = np.array([y0 - y1, x1 - x0]) / np.hypot(x1 - x0, y1 - y0)
    sides = []
    for text in axes.texts:
        box = text.get_window_extent()
        off = (np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) - (x0, y0)) @ normal
        assert abs(off) > text.get_fontsize() / 72 * fig.dpi / 2
        sides.append(off > 0)
    assert sides == [True, False]  # the value above, the gradient below
