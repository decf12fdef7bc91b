"""Every activation and loss against mpmath, in every dtype, where rounding hurts most.

That is at 0, at the least numbers, at kinks, in both tails and at infinity. Ours may be off by a
few units in the last place, or by as much as `jax.grad` of the same value.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import default_jit
from jax.scipy.special import xlog1py, xlogy
from mpmath import mp, mpf

from fnn import activations
from fnn.nets.activations import ACTIVATIONS, softmax
from fnn.nets.losses import LOSSES

DTYPES = ("bfloat16", "float16", "float32", "float64")
SIZES = (1e-4, 0.25, 1.0, 2.0, 3.0, 6.0, 8.0, 17.0, 20.0, 40.0, 1e4, 1e30, np.inf)
# Units in the last place that rounding may cost.
FEW = 4
# More where a derivative passes through 0, or the exponent itself is rounded.
MORE = {
    "gelu": 64,
    "gelu(approximate=False)": 256,
    "silu": 16,
    "mish": 16,
    "squareplus": 32,
    "softmax": 64,
    "sigmoid_binary_cross_entropy": 64,
    "softmax_cross_entropy": 64,
    "softmax_cross_entropy_with_integer_labels": 16,
}
FAR = mpf(10) ** 320  # stands for infinity: beyond every dtype
mp.dps = 60


# The truth


def exp(x):
    return mp.exp(clip(x, -1e5, 1e5))


def sigma(x):
    return 1 / (1 + exp(-x))


def bell(x):
    return sigma(x) * sigma(-x)


def clip(x, low, high):
    return min(max(x, mpf(low)), mpf(high))


def softplus(x):
    return max(x, 0) + mp.log1p(exp(-abs(x)))


def elu(x, alpha=1):
    return x if x > 0 else alpha * mp.expm1(max(x, mpf(-1e5)))


def elu_slope(x, alpha=1):
    return mpf(1) if x > 0 else alpha * exp(x)


def squareplus(x):
    root = mp.sqrt(x**2 + 4)
    return (x + root) / 2 if x > 0 else 2 / (root - x)


def normal(x):
    return mp.ncdf(clip(x, -1e3, 1e3))


def density(x):
    return mp.npdf(clip(x, -1e3, 1e3))


def cubic(x):
    return mp.sqrt(8 / mp.pi) * (x + mpf("0.044715") * x**3)


def cubic_slope(x):
    return mp.sqrt(8 / mp.pi) * (1 + 3 * mpf("0.044715") * x**2)


ALPHA = mpf("1.6732632423543772848170429916717")
SCALE = mpf("1.0507009873554804934193349852946")
# By name: the value and the derivative, each of one number.
ELEMENTWISE = {
    "identity": (lambda x: x, lambda x: 1),
    "step": (lambda x: 1 if x >= 0 else -1, lambda x: 0),
    "sigmoid": (sigma, bell),
    "tanh": (mp.tanh, lambda x: 4 * bell(2 * x)),
    "relu": (lambda x: max(x, 0), lambda x: x > 0),
    "leaky_relu": (lambda x: max(x, x / 100), lambda x: 1 if x >= 0 else mpf(1) / 100),
    "relu6": (lambda x: clip(x, 0, 6), lambda x: 0 < x < 6),
    "elu": (elu, elu_slope),
    "celu": (elu, elu_slope),
    "selu": (lambda x: SCALE * elu(x, ALPHA), lambda x: SCALE * elu_slope(x, ALPHA)),
    "gelu": (
        lambda x: x * sigma(cubic(x)),
        lambda x: sigma(cubic(x)) + x * bell(cubic(x)) * cubic_slope(x),
    ),
    "gelu(approximate=False)": (
        lambda x: x * normal(x),
        lambda x: normal(x) + x * density(x),
    ),
    "silu": (lambda x: x * sigma(x), lambda x: sigma(x) + x * bell(x)),
    "mish": (
        lambda x: x * mp.tanh(softplus(x)),
        lambda x: mp.tanh(softplus(x)) + 4 * x * bell(2 * softplus(x)) * sigma(x),
    ),
    "softplus": (softplus, sigma),
    "log_sigmoid": (lambda x: -softplus(-x), lambda x: sigma(-x)),
    "soft_sign": (lambda x: x / (1 + abs(x)), lambda x: (1 + abs(x)) ** -2),
    "squareplus": (squareplus, lambda x: squareplus(x) / mp.sqrt(x**2 + 4)),
    "hard_tanh": (lambda x: clip(x, -1, 1), lambda x: abs(x) <= 1),
    "hard_sigmoid": (lambda x: clip(x + 3, 0, 6) / 6, lambda x: mpf(abs(x) < 3) / 6),
    "hard_silu": (
        lambda x: x * clip(x + 3, 0, 6) / 6,
        lambda x: (2 * x + 3) / 6 if abs(x) < 3 else x > 0,
    ),
    "sparse_plus": (
        lambda x: x if x > 1 else clip(x + 1, 0, 2) ** 2 / 4,
        lambda x: clip(x + 1, 0, 2) / 2,
    ),
    "sparse_sigmoid": (
        lambda x: clip(x + 1, 0, 2) / 2,
        lambda x: (mpf(abs(x) < 1) + mpf(abs(x) <= 1)) / 4,
    ),
}


def log_softmax(z):
    rest = [exp(a - max(z)) for a in z]
    rest.remove(1)
    return [a - max(z) - mp.log1p(sum(rest)) for a in z]


def cross_entropy_slope(z, t):
    return [sum(t) * exp(a) - b for a, b in zip(log_softmax(z), t, strict=True)]


def softmax_slope(z, dy):
    y = [exp(a) for a in log_softmax(z)]
    return [
        a * sum(b * (d - e) for b, e in zip(y, dy, strict=True)) for a, d in zip(y, dy, strict=True)
    ]


def one_hot(z, label):
    return [mpf(i == label) for i in range(len(z))]


def dot(t, logarithms):
    return sum((a * b for a, b in zip(t, logarithms, strict=True) if a), mpf(0))


def log(x):
    return mp.log(x) if x else -FAR


def ratio(a, b):
    return (a / b if b else FAR) if a else mpf(0)


def huber(e):
    return e**2 / 2 if abs(e) <= 1 else abs(e) - mpf(1) / 2


def log_cosh(e):
    return abs(e) + mp.log1p(mp.expm1(-2 * clip(abs(e), 0, 1e5)) / 2)


# By name: the value and the gradient, each of one output, or of a row of them.
ROWS = {
    "l2_loss": (lambda y, t: (y - t) ** 2 / 2, lambda y, t: y - t),
    "squared_error": (lambda y, t: (y - t) ** 2, lambda y, t: 2 * (y - t)),
    "huber_loss": (lambda y, t: huber(y - t), lambda y, t: clip(y - t, -1, 1)),
    "log_cosh": (lambda y, t: log_cosh(y - t), lambda y, t: mp.tanh(y - t)),
    "hinge_loss": (lambda y, t: max(1 - y * t, mpf(0)), lambda y, t: -t if y * t < 1 else 0),
    "sigmoid_binary_cross_entropy": (
        lambda z, t: t * softplus(-z) + (1 - t) * softplus(z),
        lambda z, t: (1 - t) * sigma(z) - t * sigma(-z),
    ),
    "binary_cross_entropy": (
        lambda p, t: -dot([t, 1 - t], [log(p), log(1 - p)]),
        lambda p, t: ratio(1 - t, 1 - p) - ratio(t, p),
    ),
    "softmax_cross_entropy": (lambda z, t: -dot(t, log_softmax(z)), cross_entropy_slope),
    "softmax_cross_entropy_with_integer_labels": (
        lambda z, t: -log_softmax(z)[t],
        lambda z, t: cross_entropy_slope(z, one_hot(z, t)),
    ),
    "kl_divergence": (
        lambda q, t: dot(t, [log(a) - b for a, b in zip(t, q, strict=True)]),
        lambda q, t: [-a for a in t],
    ),
}


# The measure


def limits(dtype):
    """Epsilon, the least normal number and the greatest one."""
    info = jnp.finfo(dtype)
    return float(info.eps), float(info.tiny), float(info.max)


def units(found, truth, dtype):
    """The error in units in the last place; infinite for a NaN."""
    eps, tiny, greatest = (mpf(number) for number in limits(dtype))
    found, truth = float(found), mpf(truth)
    if np.isnan(found):
        return np.inf
    if abs(truth) > greatest * (1 - eps / 4):
        return 0.0 if np.isinf(found) and (found > 0) == (truth > 0) else np.inf
    if np.isinf(found):
        return np.inf
    if abs(truth) < tiny and abs(found) <= tiny:
        return 0.0  # XLA may make 0 of what is below the least normal number
    return float(abs(found - truth) / (eps * max(abs(truth), tiny)))


def exact(a, dtype, flush):
    """Numbers for mpmath; `flush` makes 0 of those below the least normal one, as XLA may."""
    if isinstance(a, int):
        return a  # a label
    a = np.asarray(a, np.float64)
    if flush:
        a = np.where(np.abs(a) < limits(dtype)[1], 0, a)
    numbers = [mpf(x) if np.isfinite(x) else FAR * int(np.sign(x)) for x in a.tolist()]
    return numbers if len(numbers) > 1 else numbers[0]


def truths(truth, row, dtype):
    """What a row of inputs gives: as it is, and flushed."""
    inputs = [tuple(exact(a, dtype, flush) for a in row) for flush in (False, True)]
    found = [truth(*numbers) for numbers in inputs[: 1 + (inputs[0] != inputs[1])]]
    return [true if isinstance(true, list) else [true] for true in found]


def error(row, possible, dtype):
    """The greatest error of the numbers of a row, against the nearer truth."""
    return min(max(map(units, np.ravel(row), true, itertools.repeat(dtype))) for true in possible)


def check(name, dtype, truth, rows, ours, *theirs):
    """Asserts that every row of ours is as exact as allowed, or as the best of theirs."""
    for row, mine, *others in zip(rows, ours, *theirs, strict=True):
        possible = truths(truth, row, dtype)
        mine, *best = (error(found, possible, dtype) for found in (mine, *others))
        assert mine <= max(MORE.get(name, FEW), min(best)), (dtype, row, mine, best)


# The points


def points(dtype):
    """0, numbers of every size and both signs, and random ones."""
    rng, info = np.random.default_rng(0), jnp.finfo(dtype)
    sizes = np.array([float(info.smallest_subnormal), float(info.tiny), *SIZES])
    sizes = sizes[(sizes <= float(info.max)) | np.isinf(sizes)]
    return np.array([0, *sizes, *-sizes, *rng.normal(0, 4, 30), *rng.uniform(-90, 90, 15)])


def batch(loss, dtype):
    """Outputs `[batch, outputs]` and targets for a loss."""
    rng, x, eps = np.random.default_rng(1), points(dtype), limits(dtype)[0]
    uniform = rng.uniform(size=len(x))
    targets = {
        "numbers": [np.zeros(len(x)), rng.normal(size=len(x))],
        "signs": [np.ones(len(x)), -np.ones(len(x))],
        "bits": [np.zeros(len(x)), np.ones(len(x)), uniform],
        "probabilities": [np.zeros(len(x)), np.ones(len(x)), uniform],
    }.get(loss.targets)
    if targets:
        if loss.targets == "probabilities":
            x = np.array([*np.abs(x[np.abs(x) < 1]), 1, 1 - eps, *rng.uniform(size=len(x))])
            x = x[: len(uniform)]
        return np.tile(x, len(targets))[:, None], np.concatenate(targets)[:, None]
    gaps = -np.abs(x) if loss.name == "kl_divergence" else x
    rows = [
        np.stack([gaps, 0 * np.sign(gaps), np.full(len(x), -1.0)], 1),
        rng.normal(0, 5, (20, 3)),
    ]
    rows = np.concatenate([*rows, 1e4 + rng.normal(size=(5, 3))])
    labels = np.repeat(np.arange(3), len(rows))
    if loss.targets == "labels":
        return np.tile(rows, (3, 1)), labels
    soft = rng.dirichlet(np.ones(3), len(rows))
    return np.tile(rows, (4, 1)), np.concatenate([np.eye(3)[labels], soft])


def cast(a, dtype):
    return a if a.dtype.kind == "i" else np.asarray(a).astype(jnp.dtype(dtype))


# The tests


def jax_nn(activation):
    """JAX's function of that name."""
    if activation.name == "step":  # lecture 000
        return lambda x: jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))
    if activation.name == "gelu(approximate=False)":
        return lambda x: jax.nn.gelu(x, approximate=False)
    return getattr(jax.nn, activation.name)


def value_and_slope(f, x, dy):
    y, pullback = jax.vjp(f, x)
    return y, pullback(dy)[0]


def manual(activation, x, dy):
    y, residuals = activation.forward((), x)
    return y, activation.backward((), residuals, dy)[1]


@pytest.mark.parametrize(
    "activation",
    [*(a for a in ACTIVATIONS if a is not softmax), activations.gelu(approximate=False)],
    ids=repr,
)
def test_an_activation_and_its_derivative_are_as_exact_as_jaxs(x64, activation):
    truth = ELEMENTWISE[activation.name]

    @default_jit
    def everything(inputs):
        return {
            dtype: (
                manual(activation, x, jnp.ones_like(x)),
                value_and_slope(jax_nn(activation), x, jnp.ones_like(x)),
                value_and_slope(lambda x: activation.apply((), x), x, jnp.ones_like(x)),
            )
            for dtype, x in inputs.items()
        }

    inputs = {dtype: cast(points(dtype), dtype) for dtype in DTYPES}
    for dtype, found in everything(inputs).items():
        rows = [([x],) for x in inputs[dtype]]
        for true, *results in zip(truth, *found, strict=True):
            check(activation.name, dtype, true, rows, *map(np.asarray, results))


def test_softmax_and_its_backward_are_as_exact_as_jaxs(x64):
    loss = next(loss for loss in LOSSES if loss.targets == "one_hot")

    @default_jit
    def everything(inputs):
        return {
            dtype: (manual(softmax, x, dy), value_and_slope(jax.nn.softmax, x, dy))
            for dtype, (x, dy) in inputs.items()
        }

    inputs = {dtype: tuple(cast(a, dtype) for a in batch(loss, dtype)) for dtype in DTYPES}
    for dtype, found in everything(inputs).items():
        rows = list(zip(*inputs[dtype], strict=True))
        truth = (lambda z, dy: [exp(a) for a in log_softmax(z)], softmax_slope)
        for true, *results in zip(truth, *found, strict=True):
            check("softmax", dtype, true, rows, *map(np.asarray, results))


def optax_value(loss, y, t):
    """Optax's value, `[batch]`."""
    if loss.name == "binary_cross_entropy":  # lecture 004, eq 5
        values = -xlogy(t, y) - xlog1py(1 - t, -y)
    else:
        values = getattr(optax.losses, loss.name)(y, t)
    return values.sum(tuple(range(1, values.ndim)))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_and_its_gradient_are_as_exact_as_optaxs_and_jax_grads(x64, loss):
    truth = ROWS[loss.name]

    @default_jit
    def everything(inputs):
        return {
            dtype: (
                (loss.value(y, t), loss.grad(y, t)),
                value_and_slope(lambda y, t=t: optax_value(loss, y, t), y, jnp.ones_like(y[:, 0])),
                value_and_slope(lambda y, t=t: loss.value(y, t), y, jnp.ones_like(y[:, 0])),
            )
            for dtype, (y, t) in inputs.items()
        }

    inputs = {dtype: tuple(cast(a, dtype) for a in batch(loss, dtype)) for dtype in DTYPES}
    for dtype, found in everything(inputs).items():
        y, t = inputs[dtype]
        rows = list(zip(y, t.tolist() if t.ndim == 1 else t, strict=True))
        for true, *results in zip(truth, *found, strict=True):
            check(loss.name, dtype, true, rows, *map(np.asarray, results))


def test_a_right_answer_by_a_gap_of_20_has_the_loss_of_the_other_classes():
    logits, labels = jnp.array([[20.0, 0.0, 0.0]]), jnp.array([0])
    others = 2 * np.exp(-20.0)
    for loss, targets in ((LOSSES[7], jax.nn.one_hot(labels, 3)), (LOSSES[8], labels)):
        np.testing.assert_allclose(loss.value(logits, targets), [others], rtol=1e-6)
        expected = [[-others, others / 2, others / 2]]
        np.testing.assert_allclose(loss.grad(logits, targets), expected, rtol=1e-6)
