"""The computational graph: its sweeps against JAX, gate by gate and on generated expressions.

What it prints and draws.
"""

import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide
from jax import lax

import fnn
from fnn import graph
from fnn.graph import GATES
from fnn.graph import draw as drawing


def close(ours, truth):
    """The two trees are the same to 1e-12 of the size of the true one."""
    assert jax.tree.structure(ours) == jax.tree.structure(truth)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert jnp.shape(a) == jnp.shape(b)
        if jnp.result_type(b) == jax.dtypes.float0:
            assert a.dtype == b.dtype
        else:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(
                a, b, rtol=1e-12, atol=1e-12 * float(np.abs(b).max(initial=0))
            )


def agrees(f, *args):
    """Value, gradient and tangent are JAX's; returns the graph."""
    g = graph.trace(f, *args)
    close(g.value, jax.tree.map(jnp.asarray, f(*args)))
    argnums = tuple(range(len(args)))
    close(g.gradients(), jax.grad(f, argnums, allow_int=True)(*args))
    rng = np.random.default_rng(0)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=jnp.shape(a))), args)

    def for_jax(a, t):
        return (
            t
            if jnp.issubdtype(jnp.result_type(a), jnp.floating)
            else np.zeros(jnp.shape(a), jax.dtypes.float0)
        )

    close(g.jvp(*tangents), jax.jvp(f, args, jax.tree.map(for_jax, args, tangents))[1])
    return g


# Gates

A, B = np.random.default_rng(0).uniform(0.3, 0.9, (2, 3, 4))
ONE = "ceil round exp exp2 log log1p expm1 sin cos tan sinh cosh tanh atan logistic erf sqrt rsqrt abs neg sign floor square"
ON = {
    **{
        name: (
            getattr(lax, name),
            (A - (0.5 if name in ("abs", "neg", "sign", "floor", "ceil", "round") else 0),),
        )
        for name in ONE.split()
    },
    **{
        name: (getattr(lax, name), (A, B))
        for name in ("add", "sub", "mul", "div", "max", "min", "pow")
    },
    "add_any": (lambda a, b: jax.vjp(lambda x: (x, x), a)[1]((a, b))[0], (A, B)),
    "integer_pow": (
        lambda a: lax.integer_pow(a, -3) + lax.integer_pow(a, 3) + lax.integer_pow(a, 1),
        (A,),
    ),
    "select_n": (lambda a, b: lax.select_n(jnp.asarray(A > 0.5), a, b), (A, B)),
    "dot_general": (
        lambda a, b: lax.dot_general(a, b, (((0,), (1,)), ((2,), (0,)))),
        (np.stack([A] * 5, 1), np.stack([B.T] * 6, 2)),
    ),
    "reduce_sum": (lambda a: a.sum(0), (A,)),
    "reduce_max": (lambda a: a.max(1), (np.round(A, 1),)),  # with ties
    "reduce_min": (lambda a: a.min((0, 1)), (np.round(A, 1),)),
    "broadcast_in_dim": (lambda a: lax.broadcast_in_dim(a, (2, 3, 5, 4), (1, 2, 3)), (A[:, None],)),
    "reshape": (lambda a: a.reshape(2, 6), (A,)),
    "squeeze": (lambda a: lax.squeeze(a, (1,)), (A[:, None],)),
    "transpose": (lambda a: jnp.transpose(a, (2, 0, 1)), (A[None],)),
    "concatenate": (lambda a, b: jnp.concatenate([a, b, a], 1), (A, B)),
    "slice": (lambda a: lax.slice(a, (0, 1), (3, 4), (2, 2)), (A,)),
    "rev": (lambda a: a[::-1], (A,)),
    "convert_element_type": (
        lambda a: a.astype(jnp.float32).astype(jnp.float64),
        (A.astype(np.float32).astype(float),),
    ),
    "copy": (lambda a: lax.copy_p.bind(a), (A,)),
    "stop_gradient": (lambda a: lax.stop_gradient(a) * a, (A,)),
}


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_the_derivative_of_jax(x64, name):
    f, args = ON[name]
    # no two entries weigh the same
    weights = jnp.cos(jnp.arange(np.size(f(*args))).reshape(np.shape(f(*args))))
    g = agrees(lambda *args: (f(*args) * weights).sum(), *map(jnp.asarray, args))
    used = {node.primitive for node in g.nodes}
    assert name in used or name == "squeeze"  # which JAX writes as a reshape where it can
    assert not g.untabled


@pytest.mark.parametrize(
    ("f", "x", "y"), [(jnp.maximum, 2.0, 2.0), (jnp.minimum, 2.0, 2.0), (jnp.hypot, 3.0, 4.0)]
)
def test_a_tie_shares_equally(x64, f, x, y):
    agrees(f, x, y)


def test_a_scalar_that_meets_an_array_gets_the_sum(x64):
    agrees(lambda a, s: lax.mul(a, lax.add(a, 2.0)).sum() * s, jnp.asarray(A), 3.0)


BINARY_GATES = [lax.add, lax.sub, lax.mul, lax.div, lax.max, lax.min, lax.pow]


@pytest.mark.parametrize("f", BINARY_GATES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shapes", [((3, 2), (1, 2)), ((3, 1), (1, 2)), ((1, 1), (3, 2))], ids=str)
def test_an_axis_of_size_one_that_meets_more_gets_the_sum(x64, f, shapes):
    """JAX's primitives stretch such axes themselves."""
    a, b = (
        jnp.asarray(np.random.default_rng(i).uniform(1, 2, shape)) for i, shape in enumerate(shapes)
    )
    weights = jnp.cos(jnp.arange(6.0)).reshape(3, 2)
    agrees(lambda a, b: (f(a, b) * weights).sum(), a, b)


def test_an_outer_product_sliced_and_stretched(x64):
    agrees(lambda a: (jnp.outer(a, a)[:, :1] * jnp.ones((4, 4))).sum(), jnp.arange(1.0, 5.0))
    agrees(
        lambda x: (x.reshape(2, 1) * x.reshape(1, 2) * jnp.array([[1.0, 2], [3, 4]])).sum(),
        jnp.array([1.0, 2.0]),
    )


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_a_whole_power_at_zero(x64, power):
    with jax.numpy_dtype_promotion("standard"):  # JAX's own derivative of it needs that
        agrees(lambda x: lax.pow(x, jnp.int32(power)), 0.0)


# Generated expressions

UNARY = [
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
]
UNARY += [
    lambda a: jnp.log(1.5 + a * a),
    lambda a: jnp.sqrt(1 + a * a),
    lambda a: 1 / (2 + jnp.cos(a)),
    lambda a: a**3,
    lambda a: -a,
]
UNARY += [
    lambda a: jnp.log1p(jnp.abs(a)),
    lambda a: jnp.expm1(jnp.tanh(a)),
    lambda a: jnp.where(a > 0, a, 0.1 * a),
    lambda a: lax.rsqrt(2 + a * a),
]
ARRAY = [
    jax.nn.softmax,
    jnp.flip,
    lambda a: a - a.max(),
    lambda a: jnp.concatenate([a[1:], a[:1]]),
    lambda a: a * jax.nn.logsumexp(a),
]
ARRAY += [
    lambda a: jnp.outer(a, a).sum(1),
    lambda a: jnp.sort(a),
    jnp.cumsum,
    lambda a: a.reshape(2, 2).T.reshape(4),
]
BINARY = [
    jnp.add,
    jnp.subtract,
    jnp.multiply,
    jnp.maximum,
    jnp.minimum,
    lambda a, b: a / (2 + b * b),
    lambda a, b: (1 + a * a) ** jnp.tanh(b),
]


def expression(number):
    """A function of two or three scalars or arrays `[4]` that reuses what it has computed, and a
    point."""
    rng = np.random.default_rng(number)
    count, array = int(rng.integers(2, 4)), bool(number % 2)
    steps = [
        (
            rng.integers(3 if array else 2),
            rng.integers(1000),
            rng.integers(1000),
            rng.integers(1000),
        )
        for _ in range(rng.integers(3, 13))
    ]

    def f(*xs):
        known = list(xs)
        for kind, op, i, j in steps:
            a, b = known[i % len(known)], known[j % len(known)]
            family = (UNARY, BINARY, ARRAY)[kind]
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
    swept = g.sweep().gradients
    adjoint = {node.name: float(swept[i]) for i, node in enumerate(g.nodes) if swept[i] is not None}
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
    g = agrees(
        lambda w0, w1, w2, x0, x1: 1 / (1 + jnp.exp(-(w0 * x0 + w1 * x1 + w2))),
        2.0,
        -3.0,
        -3.0,
        -1.0,
        -2.0,
    )
    np.testing.assert_allclose(g.value, 0.731059, atol=5e-7)
    np.testing.assert_allclose(
        g.gradients(), (-0.1966, -0.3932, 0.1966, 0.3932, -0.5898), atol=1e-4
    )


def test_the_words_of_the_gates():
    printed = str(graph.trace(lambda a, b, c: jnp.maximum(a + b, b * c), 1.0, 2.0, 4.0))
    assert "∂b = ∂z₂ · c + ∂z₁ = 4 + 0 = 4   copy adds" in printed
    assert "∂a = ∂z₁ = 0   add distributes" in printed
    assert "∂c = ∂z₂ · b = 2   mul swaps the multipliers" in printed
    assert (
        "∂z₂ = ∂z₃ · [z₂ is larger] = 1   max routes to the larger; a tie shares equally" in printed
    )


def test_the_chain_rule_and_the_total_derivative(x64):
    """df(g(x))/dx = f'(g(x)) g'(x); and d/dt f(g_1(t), g_2(t)) = sum_i D_i f dg_i/dt."""
    x, t = 0.7, 0.4
    np.testing.assert_allclose(
        agrees(lambda x: jnp.sin(jnp.exp(x)), x).gradients()[0],
        np.cos(np.exp(x)) * np.exp(x),
        rtol=1e-14,
    )
    f = graph.trace(lambda a, b: a * a * b, np.cos(t), np.sin(t))
    partial, inner = f.gradients(), (-np.sin(t), np.cos(t))
    total = partial[0] * inner[0] + partial[1] * inner[1]
    np.testing.assert_allclose(total, f.jvp(*inner), rtol=1e-14)
    np.testing.assert_allclose(
        total, agrees(lambda t: jnp.cos(t) ** 2 * jnp.sin(t), t).gradients()[0], rtol=1e-14
    )


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
    assert "symbolic" in str(d)
    d = graph.derivatives(lambda x: (x * x).sum(), jnp.array([3.0, -1.0]))
    assert d.symbolic is None
    assert d.names == ["x[0]", "x[1]"]
    np.testing.assert_allclose(d.numeric, [6, -2], rtol=1e-8)


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
    assert "no sweep backward: `f` returns a tree of 5 arrays" in str(g)
    assert max(map(len, str(g).splitlines())) < 160


@pytest.mark.parametrize(
    "f",
    [
        jax.nn.gelu,
        jax.nn.softmax,
        jax.nn.logsumexp,
        jax.nn.relu,
        jax.nn.log_softmax,
        jax.nn.silu,
        jnp.linalg.norm,
    ],
)
def test_functions_of_jax_are_opened_up(x64, f):
    agrees(lambda x: (f(x) * jnp.arange(1.0, 4)).sum(), jnp.array([0.3, -1.0, 2.0]))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (jnp.abs(jnp.fft.rfft(x)) ** 2).sum(),  # complex numbers on the way
        lambda x: (
            jnp.linalg.det(jnp.outer(x, x) + jnp.eye(3)) + jnp.linalg.inv(jnp.diag(x) + 0.1).sum()
        ),
        lambda x: x.at[1].set(x[0] ** 2)[1] + x[::2].sum() + jnp.cumsum(x)[1] + jnp.prod(x),
        lambda x: jax.checkpoint(lambda a: jnp.sin(jnp.exp(a)))(x).sum(),
        lambda x: lax.cond(x[0] > 0, lambda a: (a**2).sum(), lambda a: a.sum(), x),
        lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) * x.sum(), x[0]),
        lambda x: (
            (jax.grad(lambda a: (a**3).sum())(x) * x).sum()
            + jax.vmap(lambda a: jnp.sin(a) * x.sum())(x).sum()
        ),
        lambda x: (
            jnp.convolve(x, x).sum()
            + jnp.einsum("i,j,ij->", x, x, jnp.outer(x, x))
            + jnp.std(x)
            + jnp.arctan2(x[0], x[1])
        ),
    ],
)
def test_whatever_jax_differentiates(x64, f):
    g = agrees(f, jnp.array([0.3, -1.2, 2.0]))
    assert str(g)
    assert g.to_dot()


def test_a_scan_is_one_node(x64):
    def f(x):
        return lax.scan(lambda c, a: (jnp.sin(c) * a, c), x[0], x)[0]

    g = agrees(f, jnp.array([0.5, 1.5, 2.5]))
    assert [node.primitive for node in g.untabled] == ["scan"]
    assert "scan is not among the gates; its gradient is by jax.vjp" in str(g)


def test_a_derivative_of_its_own_is_kept_where_it_differs(x64):
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), ()), lambda _, g: (g,))
    g = graph.trace(lambda x: 3 * straight_through(x), 0.4)
    assert float(g.gradients()[0]) == 3
    assert [node.label for node in g.untabled] == ["straight_through"]
    # as jax.nn.relu; a bare max would share
    assert float(graph.trace(jax.nn.relu, 0.0).gradients()[0]) == 0
    assert not graph.trace(jax.nn.relu, 1.0).untabled
    net = fnn.mlp((3, 2), "relu")

    def manual(params):
        return fnn.with_manual_vjp(net)(params, jnp.ones((2, 3))).sum()

    params = net.init(jax.random.key(0))
    close(graph.trace(manual, params).gradients()[0], jax.grad(manual)(params))


def test_keys_and_prints_do_not_disturb(x64):
    def f(x, key):
        jax.debug.print("{x}", x=x)
        return (x * jax.random.normal(key, (3,))).sum()

    g = graph.trace(f, jnp.arange(3.0), jax.random.key(0))
    np.testing.assert_allclose(
        g.gradients()[0], jax.random.normal(jax.random.key(0), (3,)), rtol=1e-12
    )
    assert g.gradients()[1].dtype == jax.dtypes.float0


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
        g = graph.trace(circuit, 1.1, 2.0, 3.0)
        gradient, text = g.gradients(), str(g)
    close(g.gradients(), gradient)
    assert gradient[0].dtype == g.jvp(1.0, 0.0, 0.0).dtype == np.float64
    assert str(g) == text


def custom(f, backward, name="own"):
    """A function whose derivative is another than its own."""
    g = jax.custom_vjp(f)
    f.__name__ = g.__name__ = name
    g.defvjp(lambda x: (f(x), x), backward)
    return g


OWN = {
    "clips the gradient": (
        lambda x: 5 * custom(lambda x: x * 1, lambda x, g: (jnp.clip(g, -1, 1),))(x).sum(),
        np.array([0.4, 2.0]),
    ),
    "turns it round": (
        lambda x: (jnp.arange(5.0) * custom(lambda x: x * 1, lambda x, g: (g[::-1],))(x)).sum(),
        np.ones(5),
    ),
    "triples it in bfloat16": (custom(lambda x: x * 1, lambda x, g: (3 * g,)), jnp.bfloat16(2)),
    "has a gate's name": (lambda x: 3 * custom(jnp.floor, lambda x, g: (g,), "floor")(x), 0.4),
    "has a gate's name with parameters": (
        lambda x: 3 * custom(jnp.floor, lambda x, g: (g,), "integer_pow")(x),
        0.4,
    ),
    "is implicit": (
        custom(
            lambda a: lax.while_loop(
                lambda c: abs(c * c - a) > 1e-9, lambda c: 0.5 * (c + a / c), a
            ),
            lambda a, g: (g / 2 / a**0.5,),
        ),
        2.0,
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_derivative_of_its_own_counts(x64, name):
    f, x = OWN[name]
    g = graph.trace(f, x)
    np.testing.assert_allclose(
        np.asarray(g.gradients()[0], float), np.asarray(jax.grad(f)(x), float), rtol=1e-12
    )
    assert "is not among the gates" in str(g)


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
    (lambda x: lax.pow(x, jnp.full(4, 2)).sum(), np.ones(4)),
    (lambda z1: z1 * z1, 2.0),
]


@pytest.mark.parametrize(("f", "x"), NOT_WANTED)
def test_what_is_not_wanted_is_not_computed(x64, f, x):
    g = agrees(f, jnp.asarray(x))
    assert len({node.name for node in g.nodes if node.primitive != "constant"}) == sum(
        n.primitive != "constant" for n in g.nodes
    )


@jax.custom_jvp
def safe_root(x):
    """The root of what is above 0, without the infinite slope at 0 that its inside has."""
    return jnp.where(x > 0, jnp.sqrt(x), 0.0)


@safe_root.defjvp
def _safe_root_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return safe_root(x), jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0) * t


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (safe_root, 0.0),
        (jax.nn.log1mexp, 0.0),
        (jax.scipy.special.log_ndtr, np.inf),
        (jax.scipy.special.exp1, 1.0),
    ],
)
def test_a_derivative_of_its_own_is_kept_where_the_inside_has_none(x64, f, x):
    np.testing.assert_allclose(graph.trace(f, x).gradients()[0], jax.grad(f)(x), rtol=1e-12)


def test_a_kink_is_seen_in_short_dtypes():
    x = jnp.array([0.0, 2.0, 1.0], jnp.bfloat16)
    np.testing.assert_array_equal(
        graph.trace(lambda x: jax.nn.relu(x).sum(), x).gradients()[0].astype(jnp.float32), [0, 1, 1]
    )


first_of_two = jax.custom_vjp(lambda x, y: 2 * x)
first_of_two.defvjp(lambda x, y: (2 * x, None), lambda _, g: (2 * g, None))

# what the result does not depend on gets no zero, which would meet an infinite slope
UNUSED = {
    "custom_vjp": (lambda x: first_of_two(x[0], jnp.sqrt(x[1] - 1)),),
    "scan": (lambda x: lax.scan(lambda c, a: (c * a[0], a[1]), 1.0, (x, jnp.sqrt(x - 1)))[0],),
    "carry": (
        lambda x: lax.scan(lambda c, a: ((c[0] * a, c[1] * 2), None), (1.0, jnp.sqrt(x[0] - 1)), x)[
            0
        ][0],
    ),
    "sort": (lambda x: lax.sort((x, jnp.sqrt(x - 1)), num_keys=1)[0].sum(),),
}


@pytest.mark.parametrize("name", UNUSED)
def test_no_zero_meets_an_infinity(x64, name):
    (f,) = UNUSED[name]
    found, truth = graph.trace(f, jnp.ones(3)).gradients()[0], jax.grad(f)(jnp.ones(3))
    assert bool(jnp.isfinite(truth).all())
    np.testing.assert_array_equal(found, truth)


def test_a_complex_result_takes_a_complex_cotangent():
    x, c = jnp.array([1.0, 2.0]), jnp.array([1 + 2j, 3.0], jnp.complex64)
    np.testing.assert_allclose(
        graph.trace(jnp.fft.fft, x).gradients(c)[0], jax.vjp(jnp.fft.fft, x)[1](c)[0]
    )


def test_what_is_printed_is_what_is_computed():
    """Sums over what was stretched, products that are no matrix product, choices, whole numbers,
    negative powers."""
    printed = str(graph.trace(lambda a, s: (a * s).sum(), jnp.array([1.0, 2, 3]), 2.0))
    assert "∂s = sum of ∂z₁ · a = 6" in printed
    printed = str(
        graph.trace(
            lambda x, w: jnp.einsum("ij,kj->ik", x, w).sum(), jnp.ones((2, 3)), jnp.ones((2, 3))
        )
    )
    assert "z₁ = einsum(ij,kj->ik: x, w)" in printed
    assert "∂w = einsum(ik,ij->kj: ∂z₁, x)" in printed
    printed = str(graph.trace(lambda x: jnp.where(x > 0, x**-3, x.astype(int).astype(float)), 2.7))
    assert "z₅ = where(z₁, z₂, z₄)" in printed
    assert "z₃ = int32(x) = 2" in printed
    assert "∂x = ∂z₂ · (-3) · x^(-4) = -0.0564503" in printed
    assert "z₁ = transpose(x, (1, 2, 0))" in str(
        graph.trace(lambda x: x.transpose(1, 2, 0).sum(), jnp.ones((2, 3, 4)))
    )
    assert "  3   the result" in str(graph.trace(lambda x: 3.0, 1.0))


def test_keys_can_be_printed_and_drawn(tmp_path):
    key = jax.random.key(0)
    for g in (
        graph.trace(lambda x: x * jax.random.normal(key), 2.0),
        graph.trace(lambda x, key: x * jax.random.normal(key), 2.0, key),
    ):
        assert "key" in str(g)
        assert g.to_dot()
    assert graph.trace(lambda: jnp.float32(3)).draw(tmp_path / "constant.png").exists()


def test_symbolic_derivatives_where_there_are_any(x64):
    d = graph.derivatives(lambda n, x: lax.pow(x, n), 3, 2.0)
    np.testing.assert_allclose(d.symbolic, d.reverse, rtol=1e-14)
    assert graph.derivatives(lambda x: jnp.floor(x) * x, 2.5).symbolic is None
    assert np.isnan(graph.derivatives(jnp.sqrt, 0.0).symbolic).all()
    np.testing.assert_allclose(graph.derivatives(lambda x: jnp.sum(x) ** 2, 3.0).symbolic, [6])
    d = graph.derivatives(
        lambda x, y: jnp.tanh(jnp.sin(x * y) + jnp.exp(x) / (1 + y**2)) * jnp.log(1 + x * x),
        0.3,
        0.7,
    )
    np.testing.assert_allclose(d.symbolic, d.reverse, rtol=1e-12)


def test_no_symbolic_derivative_where_there_is_none(x64):
    def deep(x):
        z = x
        for _ in range(16):
            z = jnp.sin(z * z + x)  # written out, 2^16 terms
        return z

    for f, *args in (
        (lambda x: x.astype(int).astype(float) * x, 2.7),
        (lambda x: x.sum() ** 2, jnp.array([1.0, 2.0])),
        (lambda x, k: x * x, 2.7, jnp.ones(2)),
        (lambda x: x * jnp.nan, 0.3),
        (deep, 0.3),
    ):
        assert graph.derivatives(f, *args).symbolic is None
    with_key = graph.derivatives(lambda x, k: x * x, 2.7, jax.random.key(0))
    assert with_key.formulas == ["2*x"]
    close_numbers = graph.derivatives(lambda x: x * (1 + 1e-13) - x, 0.3)
    assert close_numbers.symbolic[0] == pytest.approx(1e-13, rel=1e-3)


def test_a_while_loop_goes_forward_only(x64):
    def f(x):
        return lax.while_loop(lambda c: c < 10, lambda c: c * x, x)

    g = graph.trace(f, 2.0)
    assert float(g.jvp(1.0)) == float(jax.jvp(f, (2.0,), (1.0,))[1])
    with pytest.raises(
        ValueError,
        match=r"`while` .* cannot be differentiated backward; perhaps `jvp` goes forward",
    ):
        g.gradients()
    assert "no sweep backward: `while`" in str(g)


def test_what_the_result_does_not_depend_on_is_not_there():
    g = graph.trace(lambda x, y: (jnp.sin(x), jnp.cos(y) * 2)[0], 1.0, 2.0)
    assert [node.name for node in g.nodes] == ["x", "y", "z₁"]
    assert float(g.gradients()[1]) == 0


def test_an_argument_that_is_the_result():
    g = graph.trace(lambda x: x, 2.0)
    assert (float(g.value), float(g.gradients()[0]), float(g.jvp(3.0))) == (2, 1, 3)
    assert "∂x = 1" in str(g)


# Bad input


backward_only = custom(lambda x: x * x, lambda x, g: (g * 2 * x[0],))


def branch(x):
    return x if x > 0 else -x


BAD = [
    (lambda: graph.trace(3, 1.0), TypeError, "`f` must be a function"),
    (
        lambda: graph.trace(branch, 1.0),
        TypeError,
        r"Python `if` or `while`.*Write `jnp.where` or `jax.lax.cond`",
    ),
    (
        lambda: graph.trace(lambda x: jnp.asarray(np.sin(x)), 1.0),
        TypeError,
        r"hands a traced value to NumPy. Use `jax.numpy`",
    ),
    (lambda: graph.trace(lambda x: float(x) * 2, 1.0), TypeError, "as a Python number"),
    (
        lambda: graph.trace(lambda x: x, "a"),
        TypeError,
        r"`x` must be a number or an array, got 'a' \(str\)",
    ),
    (
        lambda: graph.trace(lambda x: x, {"w": [None, True]}),
        TypeError,
        r"`x\['w'\]\[1\]` must be a number or an array, got True",
    ),
    (lambda: graph.trace(lambda x, y: x, 1.0), TypeError, "`f` does not take 1 arguments"),
    (lambda: graph.trace(lambda x: None, 1.0), TypeError, "`f` returns no array"),
    (lambda: graph.trace(jnp.abs, np.ones(2) * 1j), TypeError, "`x` is complex"),
    (
        lambda: graph.trace(lambda x1, x2: x1 * x2 + jnp.sin(x1), 2, 5),
        TypeError,
        r"`x₁` holds whole numbers \(int32\).*Pass floats",
    ),
    (
        lambda: graph.trace(lambda x: jnp.sqrt(x).sum(), jnp.arange(3)),
        TypeError,
        "`x` holds whole numbers",
    ),
    (lambda: graph.trace(lambda x: x * x, 3).gradients(), TypeError, r"returns int32.*Pass floats"),
    (
        lambda: graph.trace(lambda x: jnp.fft.fft(x)[0], jnp.ones(2)).gradients(),
        TypeError,
        "returns complex64, which has no gradient",
    ),
    (
        lambda: graph.trace(lambda x: (x, x), 1.0).gradients(),
        TypeError,
        "returns a tree of 2 arrays, and not one number. Pass `cotangent`",
    ),
    (
        lambda: graph.trace(jnp.cos, jnp.ones(3)).gradients(),
        TypeError,
        r"an array of shape \(3,\), and not one number. Pass `cotangent`",
    ),
    (
        lambda: graph.trace(jnp.cos, jnp.ones(3)).gradients(jnp.ones(2)),
        ValueError,
        r"`cotangent` has shape \(2,\) .* expected \(3,\)",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, jnp.ones(3)).gradients((1.0,)),
        TypeError,
        r"must be a tree like the result, \*; got \(\*,\)",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, jnp.ones(3)).jvp(1.0),
        ValueError,
        r"`tangents` has shape \(\) for x, expected \(3,\)",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, 1.0).jvp(),
        TypeError,
        "`tangents` must be one per argument",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, 1.0).draw("graph.gif"),
        ValueError,
        r"`path` must end in .svg, .png or .pdf, got 'graph.gif'",
    ),
    (lambda: graph.derivatives(lambda x: x * 2, jnp.ones(3)), TypeError, "not one number"),
    (
        lambda: graph.derivatives(lambda n: jnp.ones(3)[n] * 2.0, 1),
        TypeError,
        "hold no floating-point number",
    ),
    (
        lambda: graph.trace(lambda x, n: sum(x for _ in range(n)), 2.0, 3),
        TypeError,
        r"close over what is fixed, `lambda x: f\(x, 3\)`",
    ),
    (
        lambda: graph.trace(lambda x: x[x > 0].sum(), jnp.ones(3)),
        TypeError,
        "close over what is fixed",
    ),
    (
        lambda: graph.trace(lambda x: x, np.array(["a"])),
        TypeError,
        "`x` must hold numbers, got <U1",
    ),
    (
        lambda: graph.trace(lambda x: x, np.array(["2020-01-01"], "M8[D]")),
        TypeError,
        "`x` must hold numbers, got datetime64",
    ),
    (
        lambda: graph.trace(backward_only, 2.0).jvp(1.0),
        TypeError,
        r"`own` \(z₁\) cannot be differentiated forward; perhaps `gradients`",
    ),
    (
        lambda: graph.trace(lambda x, n: x, 1.0, 2**40),
        ValueError,
        "`n` is 1099511627776, more than JAX's whole numbers hold",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, 1.0).gradients(1j),
        TypeError,
        "`cotangent` for z₁ is complex, expected float32",
    ),
    (
        lambda: graph.trace(lambda x: x * 2, 1.0).gradients("a"),
        TypeError,
        "`cotangent` must hold numbers",
    ),
    (
        lambda: graph.trace(lambda x, train: x, 1.0, True),
        TypeError,
        "`train` must be a number or an array, got True .* Close over it",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[message[:30] for *_, message in BAD]
)
def test_bad_input_is_a_clear_error(call, kind, message):
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


def test_a_cotangent_of_an_array_picks_what_is_differentiated(x64):
    x = jnp.array([1.0, 2.0])
    found = graph.trace(lambda x: x**2, x).gradients(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(found[0], [0, 4])


# Pictures


def test_dot_has_value_and_gradient_on_every_edge():
    g = graph.trace(circuit, 1.0, 2.0, 3.0)
    text = g.to_dot()
    assert text.count("->") == 8
    assert text.count(drawing.VALUE) == text.count(drawing.GRADIENT) == 8
    assert 'label="z₃: 2 ×"' in text
    assert 'label="x₁ = 1"' in text


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_picture_is_drawn_without_graphviz(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    net, loss, params, x, t = net_case()
    file = graph.trace(fnn.value_and_grad(net, loss), params, x, t).draw(
        tmp_path / f"step.{suffix}"
    )
    assert file.stat().st_size > 5000


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_a_picture_is_drawn_by_graphviz(tmp_path):
    assert "<svg" in graph.trace(circuit, 1.0, 2.0, 3.0).draw(tmp_path / "g.svg").read_text()


def test_nodes_do_not_stand_on_one_another():
    net, loss, params, x, t = net_case()
    for g in (
        graph.trace(fnn.value_and_grad(net, loss), params, x, t),
        graph.trace(circuit, 1.0, 2.0, 3.0),
    ):
        nodes, edges = drawing.shown(g), drawing.edges(g)
        at, ways = drawing.layout(nodes, edges)
        places = {*at.values(), *(place for way in ways for place in way[1:-1])}
        assert len(places) == len(at) + sum(len(way) - 2 for way in ways)
        for column in {c for c, _ in places}:
            heights = sorted(y for c, y in places if c == column)
            assert all(b - a >= 0.99 for a, b in itertools.pairwise(heights))
        for edge, way in zip(edges, ways, strict=True):
            assert [c for c, _ in way] == list(range(at[edge.start][0], at[edge.end][0] + 1))
