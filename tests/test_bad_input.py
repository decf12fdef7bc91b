"""A bad input raises at once, and the message says which argument, what was expected, what came,
and how to mend it.

One table, `CASES`; a new check is a new line in it. The fragments are texts that the message must
hold, and only the library's own check would write them: JAX's error of the same type, some lines
further on, does not pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import activations, losses, per_example, rules
from fnn.factors import PerExample
from fnn.nets.layers import Dense, Norm
from fnn.training import init as train_state

KEY = jax.random.key(0)
LEGACY = np.zeros(2, np.uint32)  # what `jax.random.PRNGKey` gives


def params_of(net: fnn.Layer) -> Any:
    """Parameters of the right shapes, without a compilation."""
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), jax.eval_shape(net.init, KEY)
    )


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), tree)


def changed(a: Any, place: tuple[int, ...], number: float) -> Any:
    """A copy with another number at one place."""
    a = np.array(a)
    a[place] = number
    return a


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
T = np.ones((4, 2), np.float32)
LABELS = np.array([0, 1, 1, 0])
ONES = np.ones(4, np.float32)
RATES = np.full(3, 0.1, np.float32)

NET = fnn.mlp((3, 4, 2))
PARAMS = params_of(NET)
ONE_OUTPUT = fnn.mlp((3, 1))
DENSE = fnn.dense(3, 2)
REPEATED = fnn.repeat(fnn.serial(fnn.dense(3, 3), activations.tanh), 2)
NO_PARAMS = fnn.serial(activations.tanh)
CROSS_ENTROPY = losses.softmax_cross_entropy_with_integer_labels
RULE = rules.backprop(NET, losses.l2_loss)
CLASSES = rules.backprop(NET, CROSS_ENTROPY)
ONE_HOT = rules.backprop(NET, losses.softmax_cross_entropy)


def users_loss(value: Callable[..., Any]) -> fnn.Loss:
    return fnn.Loss("mine", value, lambda y, t: 2 * (y - t))


def grad(
    x: Any = X,
    t: Any = T,
    w: Any = None,
    *,
    params: Any = PARAMS,
    net: Any = NET,
    loss: Any = losses.l2_loss,
) -> Any:
    return fnn.value_and_grad(net, loss)(params, x, t, w)


def fit(
    data: Any = (X, T),
    rule: Any = RULE,
    optimizer: Any = optax.sgd(0.1),
    params: Any = PARAMS,
    **settings: Any,
) -> Any:
    return fnn.fit(
        rule, optimizer, params, data, **{"epochs": 1, "batch_size": 2, "key": KEY} | settings
    )


def many(
    data: Any = (X, T),
    optimizer: Any = optax.sgd,
    init: Any = NET.init,
    keys: Any = None,
    **settings: Any,
) -> Any:
    keys = jax.random.split(KEY, 3) if keys is None else keys
    return fnn.fit_many(
        RULE,
        optimizer,
        init,
        data,
        keys=keys,
        **{"epochs": 1, "batch_size": 2, "learning_rates": RATES} | settings,
    )


class Unhashable:
    """A function that cannot be a key."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, params: Any) -> Any:
        return ()


SOURCE = fnn.source(NET, losses.l2_loss)
STATISTICS = (
    "gradients",
    "norms",
    "gram",
    "weighted_gradient",
    "moments",
    "signal_to_noise",
    "noise_scale",
)


def clipped(max_norm: Any = 1.0, x: Any = X, t: Any = T, w: Any = None, **settings: Any) -> Any:
    return per_example.clipped_gradient(SOURCE, max_norm, **settings)(PARAMS, x, t, weights=w)


def in_float64(call: Callable[[], Any]) -> Any:
    with jax.enable_x64(True):
        return call()


class Case(NamedTuple):
    """One bad input."""

    id: str
    call: Callable[[], Any]
    error: type[Exception]
    fragments: tuple[str, ...]  # all of them are in the message


def case(id: str, call: Callable[[], Any], error: type[Exception], *fragments: str) -> Case:
    return Case(id, call, error, fragments)


def positive_whole(name: str, make: Callable[[Any], Any], label: str = "") -> tuple[Case, ...]:
    """The cases of an argument that must be a whole number above 0."""
    expected, label = f"`{name}` must be a whole number above 0", label or name
    return tuple(
        case(
            f"{label}={number!r}",
            lambda number=number: make(number),
            error,
            expected,
            f"got {number!r}",
        )
        for number, error in (
            (0, ValueError),
            (-1, ValueError),
            (1.5, TypeError),
            (True, TypeError),
            ("3", TypeError),
        )
    )


# Tracing shows these: rank, width, length, dtype, structure. Also run under `jax.eval_shape` below.
SHAPES = (
    case("x is one example", lambda: grad(X[0], T[0]), ValueError, "`x`", "3", "`targets`", "2"),
    case(
        "x is 1-D",
        lambda: grad(X[0], np.ones((3, 2), np.float32)),
        ValueError,
        "`x` has shape (3,)",
        "[batch, features]",
        "`x[None]`",
    ),
    case("x is a number", lambda: grad(X[0, 0]), ValueError, "`x` ()", "batch axis", "`x[None]`"),
    case(
        "x has too few features",
        lambda: grad(X[:, :2]),
        ValueError,
        "dense(3, 4)",
        "`x` has shape (4, 2)",
        "[..., 3]",
        "`x.T`",
    ),
    case(
        "x has too many features",
        lambda: grad(np.ones((4, 5), np.float32)),
        ValueError,
        "`x` has shape (4, 5)",
        "[..., 3]",
    ),
    case(
        "x is images",
        lambda: grad(np.ones((4, 28, 28), np.float32)),
        ValueError,
        "`x` has shape (4, 28, 28)",
        "[..., 3]",
        "Flatten",
    ),
    case(
        "x into layer_norm",
        lambda: fnn.layer_norm(2).apply(Norm(T[0], T[0]), X),
        ValueError,
        "layer_norm(2)",
        "(4, 3)",
        "[..., 2]",
    ),
    case(
        "x and targets of other length",
        lambda: grad(t=T[:3]),
        ValueError,
        "`x`",
        "4",
        "`targets`",
        "3",
    ),
    case("empty batch", lambda: grad(X[:0], T[:0]), ValueError, "empty batch", "`x` (0, 3)"),
    case(
        "x has no batch of outputs",
        lambda: grad(t=np.ones((4, 5, 2), np.float32)),
        ValueError,
        "(4, 5, 2)",
        "`outputs` has (4, 2)",
    ),
    case(
        "one-hot rows for labels",
        lambda: grad(t=T.astype(int), loss=CROSS_ENTROPY),
        ValueError,
        "`targets`",
        "(4, 2)",
        "(4,)",
        "one label",
    ),
    case(
        "labels in a column",
        lambda: grad(t=LABELS[:, None], loss=CROSS_ENTROPY),
        ValueError,
        "`targets` has shape (4, 1)",
        "(4,)",
    ),
    case(
        "labels for a row of outputs",
        lambda: CROSS_ENTROPY.value(ONES, LABELS),
        ValueError,
        "`outputs` has shape (4,)",
        "classes",
    ),
    case(
        "labels as numbers",
        lambda: grad(t=LABELS),
        ValueError,
        "`targets` has shape (4,)",
        "`outputs` has (4, 2)",
        "one_hot",
    ),
    case(
        "labels of float",
        lambda: grad(t=ONES, loss=CROSS_ENTROPY),
        TypeError,
        "`targets` must be whole-number",
        "float32",
        "astype",
    ),
    case(
        "labels of bool",
        lambda: grad(t=ONES > 0, loss=CROSS_ENTROPY),
        TypeError,
        "`targets` must be whole-number",
        "bool",
    ),
    # weights
    case(
        "weights in a column",
        lambda: grad(w=ONES[:, None]),
        ValueError,
        "`weights` has shape (4, 1)",
        "expected (4,)",
        "one per example",
    ),
    case(
        "weights too few",
        lambda: grad(w=ONES[:3]),
        ValueError,
        "`weights` has shape (3,)",
        "expected (4,)",
    ),
    # dtypes
    case(
        "x float64, params float32",
        lambda: in_float64(lambda: grad(X.astype(float))),
        TypeError,
        "`x` is float64 but `w` is float32",
        "`x.astype(w.dtype)`",
    ),
    case(
        "targets float64",
        lambda: in_float64(lambda: grad(t=T.astype(float))),
        TypeError,
        "`targets` is float64 but `outputs` is float32",
    ),
    case(
        "params bfloat16, x float32",
        lambda: grad(params=cast(PARAMS, jnp.bfloat16)),
        TypeError,
        "`x` is float32 but `w` is bfloat16",
    ),
    case(
        "targets float32, outputs bfloat16",
        lambda: grad(X.astype(jnp.bfloat16), params=cast(PARAMS, jnp.bfloat16)),
        TypeError,
        "`targets` is float32 but `outputs` is bfloat16",
        "`targets.astype(outputs.dtype)`",
    ),
    case(
        "b bfloat16, w float32",
        lambda: DENSE.apply(Dense(X[:3, :2], cast(T[0], jnp.bfloat16)), X),
        TypeError,
        "`b` is bfloat16",
        "float32",
    ),
    case(
        "x bfloat16 into a float32 norm",
        lambda: fnn.layer_norm(3).apply(Norm(X[0], X[0]), X.astype(jnp.bfloat16)),
        TypeError,
        "`x` is bfloat16 but `scale` is float32",
    ),
    case(
        "x of whole numbers into a norm",
        lambda: fnn.rms_norm(3).apply(Norm(X[0], None), X.astype(np.int32)),
        TypeError,
        "`x` must hold floating-point numbers, got int32",
    ),
    case(
        "w of whole numbers",
        lambda: DENSE.apply(cast(params_of(DENSE), int), X),
        TypeError,
        "`w` must hold floating-point",
        "int",
    ),
    case(
        "x of whole numbers",
        lambda: grad(X.astype(np.int32)),
        TypeError,
        "`x` must hold floating-point numbers",
        "int32",
        "`x.astype(",
    ),
    case(
        "x of bools", lambda: grad(X > 0), TypeError, "`x` must hold floating-point numbers", "bool"
    ),
    case("x of text", lambda: grad(X.astype(str)), TypeError, "`x` must hold numbers", "<U"),
    case(
        "whole numbers into softmax",
        lambda: activations.softmax.apply((), LABELS),
        TypeError,
        "`x` must hold floating-point",
        "int",
    ),
    case(
        "whole numbers into relu",
        lambda: activations.relu.apply((), LABELS),
        TypeError,
        "`x` must hold floating-point numbers",
        "int",
    ),
    case(
        "x float into embedding",
        lambda: fnn.embedding(5, 2).apply(params_of(fnn.embedding(5, 2)), X),
        TypeError,
        "embedding(5, 2)",
        "`x` must hold whole numbers, got float32",
        "`x.astype(jnp.int32)`",
    ),
    # params of another net
    case(
        "params of a wider net",
        lambda: grad(params=params_of(fnn.mlp((3, 5, 2)))),
        ValueError,
        "`w` has shape (3, 5)",
        "(3, 4)",
        "another net",
    ),
    case(
        "params of a deeper net",
        lambda: grad(params=params_of(fnn.mlp((3, 4, 4, 2)))),
        ValueError,
        "tuple of 2, got a tuple of 3",
        "dense(4, 2)",
    ),
    case(
        "params without a bias",
        lambda: grad(params=params_of(fnn.mlp((3, 4, 2), bias_init=None))),
        ValueError,
        "dense(3, 4): `b` is None, expected shape (4,)",
    ),
    case(
        "params with a bias too many",
        lambda: grad(net=fnn.mlp((3, 4, 2), bias_init=None)),
        ValueError,
        "dense(3, 4): `b` has shape (4,), expected None",
    ),
    case(
        "embedding of another size",
        lambda: fnn.embedding(5, 4).apply(fnn.embedding(5, 4).init(KEY)._replace(w=X), LABELS),
        ValueError,
        "embedding(5, 4): `w` has shape (4, 3)",
        "(5, 4)",
    ),
    case(
        "bias in a row",
        lambda: DENSE.apply(Dense(X[:3, :2], T[:1]), X),
        ValueError,
        "`b` has shape (1, 2), expected shape (2,)",
    ),
    case(
        "norm without a bias",
        lambda: fnn.layer_norm(3).apply(Norm(X[0], None), X),
        ValueError,
        "`bias` is None, expected shape (3,)",
    ),
    case(
        "rms_norm with a bias",
        lambda: fnn.rms_norm(3).apply(Norm(X[0], X[0]), X),
        ValueError,
        "`bias` has shape (3,), expected None",
    ),
    case(
        "a tuple for Dense",
        lambda: DENSE.apply((X[:3, :2], T[0]), X),
        ValueError,
        "dense(3, 2): `params` must be Dense, got tuple",
    ),
    case(
        "Dense for a tuple",
        lambda: grad(params=(PARAMS[-1], PARAMS[-1])),
        ValueError,
        "`params` must be a tuple of 2, got Dense",
    ),
    case(
        "params for relu",
        lambda: grad(params=((PARAMS[0][0], PARAMS[1]), PARAMS[1])),
        ValueError,
        "relu has no parameters",
        "`()`",
        "Dense",
    ),
    case(
        "params for softmax",
        lambda: activations.softmax.apply(PARAMS, X),
        ValueError,
        "softmax has no parameters",
        "`()`",
        "tuple",
    ),
    case(
        "params of another net, backward",
        lambda: NET.backward(PARAMS[:1], NET.forward(PARAMS, X)[1], T),
        ValueError,
        "`params` must be a tuple of 2, got a tuple of 1",
    ),
    case(
        "params a list",
        lambda: grad(params=list(PARAMS)),
        ValueError,
        "`params` must be a tuple of 2, got list",
    ),
    case(
        "params None",
        lambda: grad(params=None),
        ValueError,
        "`params` must be a tuple of 2, got NoneType",
    ),
    case(
        "params a dict",
        lambda: grad(params={"w": X}),
        ValueError,
        "`params` must be a tuple of 2, got dict",
    ),
    case(
        "repeat with params of another n",
        lambda: fnn.repeat(REPEATED.layers[0], 3).apply(params_of(REPEATED), X),
        ValueError,
        "repeat(serial, 3)",
        "`params[0].w` has shape (2, 3, 3)",
        "a leading axis of 3",
    ),
    case(
        "repeat with params of one",
        lambda: REPEATED.apply(params_of(REPEATED.layers[0]), X),
        ValueError,
        "(3, 3)",
        "a leading axis of 2",
    ),
    case(
        "w given as [out, in]",
        lambda: DENSE.apply(Dense(X[:2], T[0]), X),
        ValueError,
        "`w` has shape (2, 3), expected [in, out] = (3, 2)",
        "`w.T`",
    ),
    # what combinators put together
    case(
        "residual changes the width",
        lambda: fnn.residual(DENSE).apply(params_of(DENSE), X),
        ValueError,
        "residual(dense(3, 2))",
        "(4, 3)",
        "(4, 2)",
    ),
    case(
        "repeat changes the width",
        lambda: fnn.repeat(DENSE, 2).apply(params_of(fnn.repeat(DENSE, 2)), X),
        ValueError,
        "repeat(dense(3, 2), 2)",
        "must keep the shape",
        "(4, 2)",
    ),
    # what a user's loss returns
    case(
        "user's loss per element",
        lambda: grad(loss=users_loss(lambda y, t: (y - t) ** 2)),
        ValueError,
        "mine: `value`",
        "(4,)",
        "got (4, 2)",
    ),
    case(
        "user's loss a column",
        lambda: grad(
            t=T[:, :1],
            net=ONE_OUTPUT,
            params=params_of(ONE_OUTPUT),
            loss=users_loss(lambda y, t: (y - t) ** 2),
        ),
        ValueError,
        "mine: `value` must return one number per example",
        "got (4, 1)",
    ),
    case(
        "user's loss a number",
        lambda: grad(loss=users_loss(lambda y, t: ((y - t) ** 2).sum())),
        ValueError,
        "mine: `value`",
        "(4,)",
        "got ()",
    ),
    # statistics and reports
    case(
        "norms of a net without params",
        lambda: per_example.norms(fnn.source(NO_PARAMS, losses.l2_loss))(((),), X, X),
        ValueError,
        "`params` hold no parameter",
        "no gradient",
    ),
    *(
        case(
            f"{name} of an empty batch",
            lambda f=getattr(per_example, name): f(SOURCE)(PARAMS, X[:0], T[:0]),
            ValueError,
            "empty batch",
        )
        for name in STATISTICS
    ),
    case(
        "a statistic of a user's source, empty",
        lambda: per_example.norms(lambda p, x: (x.sum(1), {"b": PerExample(x)}))(
            {"b": ONES}, X[:0]
        ),
        ValueError,
        "`source` got an empty batch",
    ),
    case(
        "clipped gradient of an empty batch",
        lambda: clipped(x=X[:0], t=T[:0]),
        ValueError,
        "empty batch",
    ),
    case(
        "weights in a column, clipped",
        lambda: clipped(w=ONES[:, None]),
        ValueError,
        "`weights` has shape (4, 1)",
        "(4,)",
        "one per example",
    ),
    case(
        "noise scale of one example",
        lambda: per_example.noise_scale(SOURCE)(PARAMS, X[:1], T[:1]),
        ValueError,
        "at least 2 examples",
    ),
    case(
        "top 5 of 4",
        lambda: per_example.top_examples(SOURCE, 5)(PARAMS, X, T),
        ValueError,
        "`k` is 5",
        "has 4 examples",
        "at most 4",
    ),
    case(
        "a batch that is no tuple",
        lambda: per_example.inner_products(SOURCE)(PARAMS, X, (X, T)),
        TypeError,
        "`batch_a` must be a tuple",
        "(x, targets)",
    ),
    case(
        "microbatches of other lengths",
        lambda: per_example.accumulate(per_example.moments(SOURCE), 2)(PARAMS, X, T[:3]),
        ValueError,
        "one length",
        "[3, 4] rows",
    ),
    case(
        "microbatches without a reduction",
        lambda: per_example.accumulate(fnn.value_and_grad(NET, losses.l2_loss), 2)(PARAMS, X, T),
        ValueError,
        "returns tuple, which does not state its reduction",
        '"mean"',
        '"examples"',
    ),
    case(
        "factors of x 1-D",
        lambda: fnn.source(NET, losses.l2_loss)(PARAMS, X[0], X[:3, :2]),
        ValueError,
        "`x` has shape (3,)",
        "`x[None]`",
    ),
    case(
        "mean_loss of a short x",
        lambda: fnn.mean_loss(NET, losses.l2_loss)(PARAMS, X[:, :2], T),
        ValueError,
        "`x` has shape (4, 2)",
        "[..., 3]",
    ),
    # The broadcast that NumPy and JAX make in silence, (N, 1) - (N,) = (N, N), in both directions.
    *(
        case(
            f"{loss}: outputs (N, 1), targets (N,)",
            lambda loss=loss: grad(t=ONES, net=ONE_OUTPUT, params=params_of(ONE_OUTPUT), loss=loss),
            ValueError,
            f"{loss}: `targets` has shape (4,) but `outputs` has (4, 1)",
            "nothing is broadcast",
            "`targets[:, None]`",
        )
        for loss in losses.LOSSES
        if loss is not CROSS_ENTROPY
    ),
    *(
        case(
            f"{loss}: outputs (N,), targets (N, 1), {name}",
            lambda loss=loss, name=name: getattr(loss, name)(ONES, ONES[:, None]),
            ValueError,
            f"{loss}: `targets` has shape (4, 1) but `outputs` has (4,)",
            "nothing is broadcast",
        )
        for loss in losses.LOSSES
        for name in ("value", "grad")
        if loss is not CROSS_ENTROPY
    ),
)

# Construction, and arguments that are of the wrong kind altogether.
KINDS = (
    # per-example statistics
    *(
        case(
            f"max_norm={number!r}",
            lambda number=number: clipped(number),
            error,
            "`max_norm` must be",
            "above 0",
            f"got {number!r}",
        )
        for number, error in (
            (0, ValueError),
            (-1.0, ValueError),
            (float("nan"), ValueError),
            (True, TypeError),
            ("1", TypeError),
        )
    ),
    case(
        "max_norm a vector",
        lambda: clipped(ONES),
        TypeError,
        "`max_norm` must be a number above 0",
        "array([1.",
    ),
    case(
        "max_norm and scale",
        lambda: clipped(1.0, scale=lambda n: n),
        TypeError,
        "Give one of `max_norm`",
        "`scale`",
    ),
    case(
        "neither max_norm nor scale",
        lambda: clipped(None),
        TypeError,
        "Give one of `max_norm`",
        "`scale`",
    ),
    case(
        "reduction max",
        lambda: clipped(reduction="max"),
        ValueError,
        "Unknown reduction 'max'",
        "mean, sum",
    ),
    *(
        case(
            f"{name} of no source",
            lambda f=getattr(per_example, name): f(3),
            TypeError,
            "`source` must be a function",
            "got 3",
        )
        for name in (*STATISTICS, "inner_products")
    ),
    case(
        "a net for a source",
        lambda: per_example.norms(NET),
        TypeError,
        "`source` must be a function",
        "`fnn.source(net, loss)`",
    ),
    *positive_whole(
        "k", lambda number: per_example.top_examples(SOURCE, number), "k of top_examples"
    ),
    *positive_whole("microbatch_size", lambda number: per_example.accumulate(clipped, number)),
    case(
        "reduction of accumulate",
        lambda: per_example.accumulate(clipped, 2, reduction="men"),
        ValueError,
        "Unknown reduction 'men'",
        "'mean'",
    ),
    *positive_whole("sizes[1]", lambda n: fnn.mlp((3, n, 2))),
    *positive_whole("in_features", lambda n: fnn.dense(n, 2), "dense in_features"),
    *positive_whole("out_features", lambda n: fnn.dense(3, n), "dense out_features"),
    *positive_whole("size", lambda n: fnn.embedding(n, 2), "embedding size"),
    *positive_whole("features", lambda n: fnn.embedding(3, n), "embedding features"),
    *positive_whole("features", fnn.layer_norm, "layer_norm features"),
    *positive_whole("n", lambda n: fnn.repeat(activations.relu, n), "repeat n"),
    *positive_whole("epochs", lambda n: fit(epochs=n)),
    *positive_whole("batch_size", lambda n: fit(batch_size=n)),
    *positive_whole(
        "batch_size",
        lambda n: fnn.evaluate(RULE, PARAMS, (X, T), batch_size=n),
        "evaluate batch_size",
    ),
    *positive_whole("epochs", lambda n: many(epochs=n), "fit_many epochs"),
    case(
        "one size",
        lambda: fnn.mlp((3,)),
        ValueError,
        "`sizes` must hold at least two sizes",
        "got (3,)",
    ),
    case(
        "no size", lambda: fnn.mlp(()), ValueError, "`sizes` must hold at least two sizes", "got ()"
    ),
    case(
        "sizes a string",
        lambda: fnn.mlp("32"),
        TypeError,
        "`sizes` must be a sequence",
        "got '32' (str)",
    ),
    case(
        "sizes a number",
        lambda: fnn.mlp(3, 2),
        TypeError,
        "`sizes` must be a sequence",
        "got 3 (int)",
    ),
    case(
        "sizes a generator",
        lambda: fnn.mlp(iter((3, 2))),
        TypeError,
        "`sizes` must be a sequence",
        "(tuple_iterator)",
    ),
    case(
        "epsilon",
        lambda: fnn.rms_norm(3, epsilon=-1e-6),
        ValueError,
        "`epsilon` must be a finite number above 0, got -1e-06",
    ),
    case(
        "kernel_init a name",
        lambda: fnn.dense(3, 2, kernel_init="he_normal"),
        TypeError,
        "`kernel_init` must be a function",
        "'he_normal'",
    ),
    case(
        "bias_init a bool",
        lambda: fnn.dense(3, 2, bias_init=False),
        TypeError,
        "`bias_init` must be a function",
        "or None, got False",
    ),
    case(
        "kernel_init a factory",
        lambda: fnn.dense(3, 2, kernel_init=jax.nn.initializers.he_normal).init(KEY),
        ValueError,
        "`kernel_init` must return an array of shape (3, 2), got <function",
        "`he_normal()`",
    ),
    case(
        "bias_init of another shape",
        lambda: fnn.dense(3, 2, bias_init=lambda key, shape: T).init(KEY),
        ValueError,
        "`bias_init`",
        "(2,), got shape (4, 2)",
    ),
    case(
        "embedding init a number",
        lambda: fnn.embedding(3, 2, init=0),
        TypeError,
        "`init` must be a function",
        "got 0",
    ),
    # names
    case(
        "unknown activation",
        lambda: fnn.mlp((3, 4, 2), "rleu"),
        ValueError,
        "Unknown activation 'rleu'",
        "Did you mean 'relu'?",
        "tanh",
    ),
    case(
        "unknown activation of no layer",
        lambda: fnn.mlp((3, 2), "rleu"),
        ValueError,
        "Unknown activation 'rleu'",
        "Did you mean 'relu'?",
    ),
    case(
        "activation in CamelCase",
        lambda: activations.get("LeakyReLU"),
        ValueError,
        "Unknown activation",
        "Did you mean 'leaky_relu'?",
    ),
    case(
        "activation a function",
        lambda: fnn.mlp((3, 4, 2), jnp.tanh),
        TypeError,
        "`activation` must be a name or a Layer",
        "`elementwise(",
    ),
    case(
        "unknown loss",
        lambda: losses.get("softmax_crossentropy"),
        ValueError,
        "Unknown loss",
        "Did you mean 'softmax_cross_entropy'?",
    ),
    case(
        "loss by its beginning",
        lambda: losses.get("l2"),
        ValueError,
        "Unknown loss 'l2'",
        "Did you mean 'l2_loss'?",
        "huber_loss",
    ),
    case(
        "activation called",
        lambda: activations.relu(X),
        TypeError,
        "relu is called with keyword settings only",
        "`relu.apply((), x)`",
    ),
    case(
        "unknown setting",
        lambda: activations.leaky_relu(slope=0.1),
        ValueError,
        "Unknown setting of leaky_relu 'slope'",
        "'negative_slope'?",
    ),
    case(
        "setting of relu",
        lambda: activations.relu(alpha=1.0),
        ValueError,
        "Unknown setting of relu 'alpha'",
        "Known: none",
    ),
    case(
        "loss called",
        lambda: losses.l2_loss(T, T),
        TypeError,
        "keyword settings only",
        "`l2_loss.value(outputs, targets)`",
    ),
    case(
        "huber delta by position",
        lambda: losses.huber_loss(2.0),
        TypeError,
        "keyword settings only",
        "huber_loss",
    ),
    case(
        "huber delta 0",
        lambda: losses.huber_loss(delta=0),
        ValueError,
        "`delta` must be",
        "above 0",
        "got 0",
    ),
    case(
        "huber delta -1",
        lambda: losses.huber_loss(delta=-1.0),
        ValueError,
        "`delta` must be",
        "above 0",
        "got -1.0",
    ),
    case(
        "huber delta NaN",
        lambda: losses.huber_loss(delta=float("nan")),
        ValueError,
        "`delta` must be",
        "got nan",
    ),
    case(
        "huber delta text",
        lambda: losses.huber_loss(delta="1"),
        TypeError,
        "`delta` must be",
        "got '1' (str)",
    ),
    case(
        "unknown setting of a loss",
        lambda: losses.huber_loss(beta=1.0),
        ValueError,
        "Unknown setting of huber_loss 'beta'",
        "'delta'?",
    ),
    # layers
    case(
        "serial of a string",
        lambda: fnn.serial(DENSE, "relu"),
        TypeError,
        "`layers[1]` must be a Layer, got 'relu'",
        "`fnn.activations.get",
    ),
    case(
        "serial of a list",
        lambda: fnn.serial([DENSE]),
        TypeError,
        "`layers[0]` must be a Layer, got [dense(3, 2)]",
        "`serial(*layers)`",
    ),
    case(
        "serial of a function",
        lambda: fnn.serial(jnp.tanh),
        TypeError,
        "`layers[0]` must be a Layer",
        "`fnn.elementwise(",
    ),
    case(
        "repeat of a string",
        lambda: fnn.repeat("relu", 2),
        TypeError,
        "`layer` must be a Layer, got 'relu'",
    ),
    case(
        "residual of a string",
        lambda: fnn.residual("relu"),
        TypeError,
        "`layer` must be a Layer, got 'relu'",
    ),
    case(
        "summary of a string",
        lambda: fnn.summary("mlp", (2, 3)),
        TypeError,
        "`net` must be a Layer, got 'mlp'",
    ),
    case(
        "summary with a width",
        lambda: fnn.summary(NET, 3),
        TypeError,
        "`input_shape` must be a tuple",
        "got 3",
        "`(batch, 3)`",
    ),
    case(
        "summary with another width",
        lambda: fnn.summary(NET, (2, 5)),
        ValueError,
        "`x` has shape (2, 5)",
        "[..., 3]",
    ),
    # seeds and keys
    case(
        "seed -1",
        lambda: fnn.key(-1),
        ValueError,
        "`seed` must be in 0 ... 2**32 - 1, got -1",
        "seed 4294967295",
    ),
    case(
        "seed 2**32",
        lambda: fnn.key(2**32),
        ValueError,
        "`seed` must be in 0 ... 2**32 - 1, got 4294967296",
        "equal seed 0",
    ),
    case(
        "seed 1.5",
        lambda: fnn.key(1.5),
        TypeError,
        "`seed` must be a whole number, got 1.5 (float)",
    ),
    case(
        "seed True",
        lambda: fnn.key(True),
        TypeError,
        "`seed` must be a whole number, got True (bool)",
    ),
    case(
        "seed text", lambda: fnn.key("0"), TypeError, "`seed` must be a whole number, got '0' (str)"
    ),
    *(
        case(
            f"{kind} for the key of {name}",
            lambda f=f, key=key: f(key),
            TypeError,
            "`key` must be a key from `jax.random.key(seed)`",
            came,
        )
        for kind, key, came in (
            ("a seed", 0, "got 0"),
            ("a legacy key", LEGACY, "got array([0, 0], dtype=uint32)"),
        )
        for name, f in (
            ("mlp", NET.init),
            ("dense", DENSE.init),
            ("norm", fnn.layer_norm(3).init),
            ("embedding", fnn.embedding(3, 2).init),
            ("repeat", REPEATED.init),
            ("fit", lambda key: fit(key=key)),
        )
    ),
    case(
        "keys for a key",
        lambda: NET.init(jax.random.split(KEY, 2)),
        ValueError,
        "`key` must be one key, got 2 of shape (2,)",
        "`key[0]`",
    ),
    # net, loss, rule, optimiser
    case(
        "net a string",
        lambda: fnn.value_and_grad("mlp", losses.l2_loss),
        TypeError,
        "`net` must be a Layer, got 'mlp'",
        "`fnn.mlp((3, 5, 2))`",
    ),
    case(
        "net a function",
        lambda: fnn.value_and_grad(NET.apply, losses.l2_loss),
        TypeError,
        "`net` must be a Layer, got <bound method",
    ),
    case(
        "net and loss swapped",
        lambda: fnn.value_and_grad(losses.l2_loss, NET),
        TypeError,
        "`net` must be a Layer, got l2_loss",
    ),
    case(
        "loss a string",
        lambda: fnn.value_and_grad(NET, "l2_loss"),
        TypeError,
        "`loss` must be a Loss, got 'l2_loss'",
        "`fnn.losses.get(",
    ),
    case(
        "loss a function",
        lambda: fnn.value_and_grad(NET, optax.l2_loss),
        TypeError,
        "`loss` must be a Loss, got <function l2_loss",
    ),
    case(
        "factors of a string",
        lambda: fnn.source("mlp", losses.l2_loss),
        TypeError,
        "`net` must be a Layer, got 'mlp'",
    ),
    case(
        "mean_loss of a string",
        lambda: fnn.mean_loss(NET, "l2_loss"),
        TypeError,
        "`loss` must be a Loss, got 'l2_loss'",
    ),
    *(
        case(
            f"{r.__name__}: net a string",
            lambda r=r: r("mlp", losses.l2_loss),
            TypeError,
            "`net` must be a Layer, got 'mlp'",
        )
        for r in rules.RULES
    ),
    *(
        case(
            f"{r.__name__}: loss a string",
            lambda r=r: r(NET, "l2"),
            TypeError,
            "`loss` must be a Loss, got 'l2'",
        )
        for r in rules.RULES
    ),
    case(
        "aggregate=3",
        lambda: rules.per_example_sgd(NET, losses.l2_loss, aggregate=3),
        TypeError,
        "`aggregate` must be a function",
        "got 3",
    ),
    case(
        "rule not made",
        lambda: fit(rule=rules.backprop),
        TypeError,
        "`rule` must be a Rule, got <function backprop",
        "`fnn.rules.backprop(net, loss)`",
    ),
    case("rule a net", lambda: fit(rule=NET), TypeError, "`rule` must be a Rule, got serial"),
    case(
        "rule of evaluate a net",
        lambda: fnn.evaluate(NET, PARAMS, (X, T)),
        TypeError,
        "`rule` must be a Rule, got serial",
    ),
    case(
        "optimizer a name",
        lambda: fit(optimizer="sgd"),
        TypeError,
        "`optimizer` must be an optax optimiser, got 'sgd'",
        "`optax.sgd(0.1)`",
    ),
    case(
        "optimizer not made",
        lambda: fit(optimizer=optax.sgd),
        TypeError,
        "`optimizer` must be an optax optimiser, got <function sgd",
    ),
    case(
        "optimizer with a list",
        lambda: fit(optimizer=optax.sgd(0.1)._replace(init=Unhashable())),
        TypeError,
        "`optimizer` must be hashable",
        "no arrays or lists",
    ),
    case(
        "optimizer a rate",
        lambda: fit(optimizer=0.1),
        TypeError,
        "`optimizer` must be an optax optimiser, got 0.1",
    ),
    case(
        "callback a number",
        lambda: fit(callback=3),
        TypeError,
        "`callback` must be a function (epoch, metrics) -> stop, got 3",
    ),
    # a list where an array belongs
    case(
        "x a list",
        lambda: grad(X.tolist()),
        TypeError,
        "`x` must be an array, got list",
        "`jnp.asarray(x)`",
    ),
    case(
        "targets a list",
        lambda: grad(t=T.tolist()),
        TypeError,
        "`targets` must be an array, got list",
        "`jnp.asarray(targets)`",
    ),
    case(
        "weights a list",
        lambda: grad(w=[1, 1, 1, 1]),
        TypeError,
        "`weights` must be an array, got list",
        "`jnp.asarray(weights)`",
    ),
    case(
        "targets of a loss a list",
        lambda: losses.l2_loss.value(T, T.tolist()),
        TypeError,
        "`targets` must be an array, got list",
    ),
    case(
        "x into embedding a list",
        lambda: fnn.embedding(5, 2).apply(params_of(fnn.embedding(5, 2)), [0, 1]),
        TypeError,
        "`x` must be an array, got list",
    ),
    case(
        "outputs a list",
        lambda: losses.l2_loss.value(T.tolist(), T),
        TypeError,
        "`outputs` must be an array, got list",
    ),
    case(
        "w a list",
        lambda: DENSE.apply(Dense(X[:3, :2].tolist(), T[0]), X),
        TypeError,
        "`w` must be an array, got list",
    ),
    case(
        "params a number, in repeat",
        lambda: REPEATED.apply((0.5,), X),
        TypeError,
        "`params[0]` must be an array, got float",
    ),
    # checks and collapse
    case(
        "compare without params",
        lambda: fnn.compare_gradients(NO_PARAMS, losses.l2_loss, ((),), X, X),
        ValueError,
        "`params` hold no array",
    ),
    case(
        "compare of a string",
        lambda: fnn.compare_gradients("mlp", losses.l2_loss, (), X, X),
        TypeError,
        "`net` must be a Layer, got 'mlp'",
    ),
    case(
        "check_layer of a function",
        lambda: fnn.check_layer(jnp.tanh, X, key=KEY),
        TypeError,
        "`layer` must be a Layer",
        "tanh",
    ),
    case(
        "check_layer of a list",
        lambda: fnn.check_layer(activations.tanh, X.tolist(), key=KEY),
        TypeError,
        "`x` must be an array, got list",
    ),
    case(
        "check_loss of a function",
        lambda: fnn.check_loss(optax.l2_loss, T, T, key=KEY),
        TypeError,
        "`loss` must be a Loss, got <function l2_loss",
    ),
    case(
        "check_loss of a list",
        lambda: fnn.check_loss(losses.l2_loss, [[1.0]], T, key=KEY),
        TypeError,
        "`outputs` must be an array, got list",
    ),
    case(
        "check_loss of a list of targets",
        lambda: fnn.check_loss(losses.l2_loss, T, T.tolist(), key=KEY),
        TypeError,
        "`targets` must be an array",
    ),
    case(
        "check_loss per element",
        lambda: fnn.check_loss(users_loss(lambda y, t: (y - t) ** 2), T, T, key=KEY),
        ValueError,
        "mine: `value` must return one number per example, shape (4,), got (4, 2)",
    ),
    case(
        "collapse with a norm",
        lambda: fnn.collapse(params_of(fnn.serial(fnn.dense(3, 3), fnn.layer_norm(3)))),
        ValueError,
        "`params` hold an array of shape (3,) outside a Dense layer",
    ),
    case(
        "collapse of nothing", lambda: fnn.collapse(()), ValueError, "`params` hold no Dense layer"
    ),
    case(
        "collapse of a net",
        lambda: fnn.collapse(NET),
        ValueError,
        "`params` hold serial outside a Dense layer",
    ),
    case(
        "collapse of no chain",
        lambda: fnn.collapse((Dense(X, None), Dense(X, None))),
        ValueError,
        "layer 1 takes 4 features",
        "gives 3",
    ),
)

# Data at the door of `fit`, `evaluate` and `fit_many`: here values count.
DATA = (
    case(
        "label too large",
        lambda: fit((X, LABELS + 1), CLASSES),
        ValueError,
        "`targets` must be labels in 0 ... 1",
        "got 2 in row 1",
        "`targets - 1`",
    ),
    case(
        "label negative",
        lambda: fit((X, LABELS - 1), CLASSES),
        ValueError,
        "`targets` must be labels in 0 ... 1",
        "got -1 in row 0",
    ),
    case(
        "label too large in evaluate",
        lambda: fnn.evaluate(CLASSES, PARAMS, (X, 2 * LABELS)),
        ValueError,
        "labels in 0 ... 1",
        "got 2 in row 1",
    ),
    case(
        "labels of float in fit",
        lambda: fit((X, ONES), CLASSES),
        TypeError,
        "`targets` must be whole-number labels, got float32",
    ),
    case(
        "rows that do not sum to 1",
        lambda: fit((X, changed(T / 2, (2, 0), 0.1)), ONE_HOT),
        ValueError,
        "`targets`",
        "sum to 1",
        "0.6 in row 2",
    ),
    case(
        "one-hot rows of zeros",
        lambda: fit((X, 0 * T), ONE_HOT),
        ValueError,
        "sum to 1, got 0 in row 0",
        "label out of range",
    ),
    case(
        "one-hot above 1",
        lambda: fit((X, 3 * T), ONE_HOT),
        ValueError,
        "`targets` must be probabilities in 0 ... 1, got 3.0",
    ),
    case(
        "signs 0 and 1",
        lambda: fit((X, 0 * T), rules.backprop(NET, losses.hinge_loss)),
        ValueError,
        "must be -1 or 1, got 0.0 in row 0",
    ),
    case(
        "signs for probabilities",
        lambda: fit((X, -T), rules.backprop(NET, losses.sigmoid_binary_cross_entropy)),
        ValueError,
        "`targets` must be probabilities in 0 ... 1, got -1.0",
        "`(targets + 1) / 2`",
    ),
    case(
        "empty data",
        lambda: fit((X[:0], T[:0])),
        ValueError,
        "`x` is empty, shape (0, 3)",
        "at least one example",
    ),
    case(
        "NaN in x",
        lambda: fit((changed(X, (2, 1), np.nan), T)),
        ValueError,
        "`x` has nan at row 2, column 1",
        "1 non-finite of 12",
    ),
    case(
        "Inf in x",
        lambda: fit((changed(X, (3, 2), -np.inf), T)),
        ValueError,
        "`x` has -inf at row 3, column 2",
    ),
    case(
        "too large for float32",
        lambda: fit((changed(X.astype(float), (1, 0), 1e300), T)),
        ValueError,
        "`x` has 1e+300 at row 1, column 0",
        "float32",
    ),
    case(
        "NaN in targets",
        lambda: fit((X, changed(T, (1, 1), np.nan))),
        ValueError,
        "`targets` has nan at row 1, column 1",
    ),
    case(
        "Inf in targets",
        lambda: fit((X, changed(T, (1, 0), np.inf))),
        ValueError,
        "`targets` has inf at row 1, column 0",
        "of 8",
    ),
    case(
        "NaN in evaluate",
        lambda: fnn.evaluate(RULE, PARAMS, (changed(X, (2, 1), np.nan), T)),
        ValueError,
        "`x` has nan at row 2, column 1",
    ),
    case(
        "NaN in fit_many",
        lambda: many((X, changed(T, (0, 1), np.nan))),
        ValueError,
        "`targets` has nan at row 0, column 1",
    ),
    case(
        "NaN in weights",
        lambda: fit((X, T, changed(ONES, (1,), np.nan))),
        ValueError,
        "`weights` has nan at row 1",
    ),
    case(
        "NaN in a loss's own check",
        lambda: losses.l2_loss.check(T, changed(T, (2, 0), np.nan)),
        ValueError,
        "`targets` has nan at row 2, column 0",
    ),
    case(
        "a negative weight",
        lambda: fit((X, T, changed(ONES, (2,), -1))),
        ValueError,
        "`weights` must be at least 0, got -1.0 in row 2",
    ),
    case("weights all 0", lambda: fit((X, T, 0 * ONES)), ValueError, "`weights` must not be all 0"),
    case(
        "weights of fit in a column",
        lambda: fit((X, T, ONES[:, None])),
        ValueError,
        "`weights` has shape (4, 1), expected (4,)",
    ),
    case(
        "targets too few", lambda: fit((X, T[:3])), ValueError, "`targets` has 3 rows but `x` has 4"
    ),
    case(
        "weights of fit too few",
        lambda: fit((X, T, ONES[:3])),
        ValueError,
        "`weights` has 3 rows but `x` has 4",
    ),
    case(
        "x a number in fit",
        lambda: fit((X[0, 0], T)),
        ValueError,
        "`x` is a single number",
        "a row per example",
    ),
    case("targets a number", lambda: fit((X, T[0, 0])), ValueError, "`targets` is a single number"),
    case("x of fit 1-D", lambda: fit((X[:, 0], T)), ValueError, "`x` has shape (4,)", "[..., 3]"),
    case(
        "x of fit too narrow",
        lambda: fit((X[:, :2], T)),
        ValueError,
        "`x` has shape (4, 2)",
        "[..., 3]",
    ),
    case(
        "targets of fit too narrow",
        lambda: fit((X, T[:, :1])),
        ValueError,
        "`targets` has shape (4, 1) but `outputs` has (4, 2)",
    ),
    case(
        "x of fit whole numbers",
        lambda: fit((X.astype(np.int32), T)),
        TypeError,
        "`x` must hold floating-point numbers, got int32",
    ),
    case(
        "x of fit a list", lambda: fit((X.tolist(), T)), TypeError, "`x` must be an array, got list"
    ),
    case(
        "targets of fit a list",
        lambda: fit((X, T.tolist())),
        TypeError,
        "`targets` must be an array, got list",
    ),
    case(
        "params of fit of another net",
        lambda: fit(params=params_of(fnn.mlp((3, 5, 2)))),
        ValueError,
        "`w` has shape (3, 5)",
        "another net",
    ),
    case(
        "params of fit a net",
        lambda: fit(params=NET),
        TypeError,
        "must be arrays, got Layer",
        "`net.init(key)`",
    ),
    case(
        "params of fit hold a number",
        lambda: fit(params=(PARAMS[0], Dense(PARAMS[1].w, 0.5))),
        TypeError,
        "got float at `params[1].b`",
    ),
    case(
        "batch_size above the data",
        lambda: fit(batch_size=5),
        ValueError,
        "`batch_size` is 5 but `data` has only 4 examples",
    ),
    # containers
    case(
        "data a list of arrays",
        lambda: fit([X, T]),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "a list of 2 arrays",
        "`tuple(data)`",
    ),
    case(
        "data one array",
        lambda: fit(X),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got ndarray",
    ),
    case(
        "data None",
        lambda: fit(None),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got NoneType",
    ),
    case(
        "data a dict",
        lambda: fit({"x": X, "targets": T}),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got dict",
    ),
    case(
        "data a 1-tuple",
        lambda: fit((X,)),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got a tuple of 1",
    ),
    case(
        "data a 4-tuple",
        lambda: fit((X, T, ONES, ONES)),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got a tuple of 4",
    ),
    case(
        "a tuple of batches",
        lambda: fit(((X[:2], T[:2]), (X[2:], T[2:]))),
        TypeError,
        "`data` must be a tuple",
        "A tuple of batches?",
        "list",
    ),
    case(
        "data of evaluate a list",
        lambda: fnn.evaluate(RULE, PARAMS, [X, T]),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got list",
    ),
    case(
        "data of fit_many a list",
        lambda: many([X, T]),
        TypeError,
        "`data` must be a tuple (x, targets)",
        "got list",
    ),
    case("no batch", lambda: fit([]), ValueError, "`data` gave no batch in epoch 0"),
    case(
        "a generator, twice",
        lambda: fit(iter([(X[:2], T[:2])]), epochs=2),
        ValueError,
        "`data` is list_iterator",
        "`epochs` is 2",
        "only once",
        "function of the epoch",
    ),
    case(
        "a function that returns None",
        lambda: fit(lambda e: None),
        TypeError,
        "`data(epoch)` must return an iterable",
        "NoneType in epoch 0",
    ),
    case(
        "a batch above batch_size",
        lambda: fit([(X, T)]),
        ValueError,
        "batch 0 of epoch 0",
        "4 examples",
        "`batch_size` 2",
        "`batch_size=4`",
    ),
    case(
        "a batch a number",
        lambda: fit([1.0]),
        TypeError,
        "`batch 0 of epoch 0` must be a tuple (x, targets)",
        "got float",
    ),
    case(
        "a batch of one array",
        lambda: fit([(X[:2],)]),
        TypeError,
        "`batch 0 of epoch 0` must be a tuple (x, targets)",
        "a tuple of 1",
    ),
    case(
        "NaN in the second batch",
        lambda: fit([(X[:2], T[:2]), (changed(X[:2], (1, 0), np.nan), T[:2])]),
        ValueError,
        "batch 1 of epoch 0: `x` has nan at row 1, column 0",
    ),
    # validation data, named as such
    case(
        "validation a list",
        lambda: fit(validation=[X, T]),
        TypeError,
        "`validation` must be a tuple (x, targets)",
        "got list",
    ),
    case(
        "validation a 1-tuple",
        lambda: fit(validation=(X,)),
        TypeError,
        "`validation` must be a tuple (x, targets)",
        "got a tuple of 1",
    ),
    case(
        "validation with NaN",
        lambda: fit(validation=(changed(X, (2, 1), np.nan), T)),
        ValueError,
        "`validation`: `x` has nan at row 2, column 1",
    ),
    case(
        "validation too narrow",
        lambda: fit(validation=(X[:, :2], T)),
        ValueError,
        "`validation`: ",
        "`x` has shape (4, 2)",
        "[..., 3]",
    ),
    case(
        "validation too short",
        lambda: fit(validation=(X, T[:2])),
        ValueError,
        "`validation`: `targets` has 2 rows but `x` has 4",
    ),
    case(
        "validation labels too large",
        lambda: fit((X, LABELS), CLASSES, validation=(X, LABELS + 1)),
        ValueError,
        "`validation`: `targets` must be labels in 0 ... 1",
        "got 2 in row 1",
    ),
    # many nets
    case(
        "a rate of 0",
        lambda: many(learning_rates=changed(RATES, (1,), 0)),
        ValueError,
        "`learning_rates` must be",
        "above 0",
        "(3,), got [0.1 0.",
    ),
    case(
        "a negative rate",
        lambda: many(learning_rates=-RATES),
        ValueError,
        "`learning_rates` must be",
        "above 0",
        "got [-0.1",
    ),
    case(
        "a rate of NaN",
        lambda: many(learning_rates=changed(RATES, (1,), np.nan)),
        ValueError,
        "`learning_rates` must be",
        "nan",
    ),
    case(
        "a rate of Inf",
        lambda: many(learning_rates=changed(RATES, (1,), np.inf)),
        ValueError,
        "`learning_rates` must be",
        "finite",
        "inf",
    ),
    case(
        "rates too few",
        lambda: many(learning_rates=RATES[:2]),
        ValueError,
        "`learning_rates` must be",
        "per key, (3,)",
        "[0.1 0.1]",
    ),
    case(
        "rates a list",
        lambda: many(learning_rates=[0.1, 0.1, 0.1]),
        TypeError,
        "`learning_rates` must be an array, got list",
    ),
    case(
        "rates of whole numbers",
        lambda: many(learning_rates=np.ones(3, int)),
        TypeError,
        "`learning_rates` must hold floating-point",
    ),
    case(
        "optimizer made, with rates",
        lambda: many(optimizer=optax.sgd(0.1)),
        TypeError,
        "`optimizer` must be a function rate",
        "`optax.sgd`",
    ),
    case(
        "optimizer not made, no rates",
        lambda: many(learning_rates=None),
        TypeError,
        "`optimizer` must be an optax optimiser",
        "sgd",
    ),
    case(
        "one key for many",
        lambda: many(keys=KEY),
        ValueError,
        "`keys` must be one key per net",
        "shape ()",
        "`jax.random.split(key, nets)`",
    ),
    case(
        "keys of rank 2",
        lambda: many(keys=jax.random.split(KEY, (2, 3))),
        ValueError,
        "`keys` must be one key per net",
        "shape (2, 3)",
    ),
    case(
        "keys of no net",
        lambda: many(keys=jax.random.split(KEY, 3)[:0]),
        ValueError,
        "`keys` must be one key per net",
        "shape (0,)",
    ),
    case(
        "keys of whole numbers",
        lambda: many(keys=np.arange(3)),
        TypeError,
        "`keys` must be an array of keys",
        "got array([0, 1, 2])",
    ),
    case(
        "keys a list",
        lambda: many(keys=[0, 1, 2]),
        TypeError,
        "`keys` must be an array of keys",
        "got [0, 1, 2]",
    ),
    case(
        "init_params a tree",
        lambda: many(init=PARAMS),
        TypeError,
        "`init_params` must be a function",
        "`net.init`",
    ),
    case(
        "batch_size of fit_many",
        lambda: many(batch_size=5),
        ValueError,
        "`batch_size` is 5 but `data` has only 4 examples",
    ),
)

CASES = (*SHAPES, *KINDS, *DATA)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_bad_input_is_named(case: Case):
    with pytest.raises(case.error) as caught:
        case.call()
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert [fragment for fragment in case.fragments if fragment not in message] == [], message


def test_every_case_has_its_own_name():
    assert len({case.id for case in CASES}) == len(CASES) >= 50


@pytest.mark.parametrize("case", SHAPES, ids=[case.id for case in SHAPES])
def test_shapes_are_checked_while_tracing(case: Case):
    with pytest.raises(case.error) as eager:
        case.call()
    with pytest.raises(case.error) as traced:
        jax.eval_shape(case.call)
    assert str(traced.value) == str(eager.value)


BAD_ARGUMENTS = {
    "x too narrow": (PARAMS, X[:, :2], T),
    "x one example": (PARAMS, X[0], T),
    "other length": (PARAMS, X, T[:3]),
    "targets too narrow": (PARAMS, X, T[:, :1]),
    "targets without an axis": (PARAMS, X, ONES),
    "weights in a column": (PARAMS, X, T, ONES[:, None]),
    "params of another net": (params_of(fnn.mlp((3, 5, 2))), X, T),
    "no bias": (params_of(fnn.mlp((3, 4, 2), bias_init=None)), X, T),
    "bfloat16 params": (cast(PARAMS, jnp.bfloat16), X, T),
    "empty": (PARAMS, X[:0], T[:0]),
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_arguments_that_are_tracers_give_the_same_error(arguments: tuple[Any, ...]):
    f = fnn.value_and_grad(NET, losses.l2_loss)
    with pytest.raises((TypeError, ValueError)) as eager:
        f(*arguments)
    for transformed in (jax.jit(f), lambda *a: jax.eval_shape(f, *a)):
        with pytest.raises(type(eager.value)) as traced:
            transformed(*arguments)
        assert str(traced.value) == str(eager.value)


def recorded(calls: list[str]) -> fnn.Rule:
    """The rule, noting that it was asked for anything that begins training."""

    def init(key: Any, params: Any) -> Any:
        calls.append("init")
        return RULE.init(key, params)

    def value_and_grad(*args: Any) -> Any:
        calls.append("value_and_grad")
        return RULE.value_and_grad(*args)

    return dataclasses.replace(RULE, init=init, value_and_grad=value_and_grad)


@pytest.mark.parametrize(
    "bad",
    [
        {"data": (X, T[:3])},
        {"data": (changed(X, (2, 1), np.nan), T)},
        {"data": [X, T]},
        {"validation": (X, T[:, :1])},
        {"validation": (changed(X, (2, 1), np.nan), T)},
        {"optimizer": "sgd"},
        {"epochs": 0},
        {"batch_size": 5},
        {"key": 0},
    ],
    ids=[
        "data",
        "nan",
        "list",
        "validation",
        "validation nan",
        "optimizer",
        "epochs",
        "batch_size",
        "key",
    ],
)
def test_a_refused_fit_has_begun_nothing(bad: dict[str, Any]):
    calls: list[str] = []
    params, before = jax.tree.map(np.copy, PARAMS), jax.tree.map(np.copy, PARAMS)
    with pytest.raises((TypeError, ValueError)):
        fit(
            **{
                "rule": recorded(calls),
                "params": params,
                "callback": lambda e, metrics: calls.append("callback"),
            }
            | bad
        )
    assert calls == []
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_fit_that_stops_at_a_bad_batch_leaves_the_params_alone():
    calls: list[int] = []
    params = jax.tree.map(jnp.array, PARAMS)
    with pytest.raises(ValueError, match="batch 1 of epoch 0"):
        fit(
            [(X[:2], T[:2]), (X[:2] * np.nan, T[:2])],
            params=params,
            callback=lambda e, metrics: calls.append(e),
        )
    assert calls == []
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)  # neither changed nor donated


@pytest.mark.parametrize("data", [(X, T), [(X, T)]], ids=["arrays", "iterable"])
def test_a_diverging_fit_says_where_and_keeps_the_last_finite_params(data: Any):
    def rate(step: Any) -> Any:
        return jnp.where(step < 2, 0.1, jnp.inf)

    calls: list[int] = []
    with pytest.raises(fnn.NonFiniteError, match=r"step 2 \(epoch 2, batch 0\)") as caught:
        fit(
            data,
            optimizer=optax.sgd(rate),
            epochs=4,
            batch_size=4,
            callback=lambda e, metrics: calls.append(e),
        )
    error = caught.value
    assert isinstance(error, FloatingPointError)
    assert error.step == 2
    assert error.leaf == "params[0][0].w"  # the gradients were finite; the update was not
    assert calls == [0, 1]
    assert error.history.step_loss.shape == (3,)
    assert error.history.loss.shape == (2,)
    assert bool(jnp.isfinite(error.history.step_loss).all())
    expected, _ = fit(data, epochs=2, batch_size=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), error.params, expected)


def test_a_nan_is_found_without_debug_nans():
    assert not jax.config.jax_debug_nans
    bad = fnn.elementwise("bad", lambda x: x, lambda x, y: jnp.full_like(x, jnp.nan))
    net = fnn.mlp((3, 4, 2), bad)
    with pytest.raises(fnn.NonFiniteError, match=r"step 0 .* leaf grads\[0\]\[0\].w"):
        fit(rule=rules.backprop(net, losses.l2_loss))


def test_a_batch_of_padding_alone_has_a_zero_gradient():
    zeros = np.zeros(4, np.float32)
    for reduction in ("mean", "sum"):
        found = clipped(w=zeros, reduction=reduction)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(found.gradient))
        assert int(found.reduction.examples) == 0
    mean, variance = per_example.moments(SOURCE)(PARAMS, X, T, weights=zeros)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((mean, variance)))
    assert all(
        (leaf == 0).all()
        for leaf in jax.tree.leaves(
            per_example.signal_to_noise(SOURCE)(PARAMS, X, T, weights=zeros).ratio
        )
    )


def test_good_input_of_every_kind_passes():
    """The other side of the table: what it is made of is no bad input by itself."""
    assert jax.tree.map(jnp.shape, grad()[1]) == jax.tree.map(jnp.shape, PARAMS)
    assert train_state(RULE, optax.sgd(0.1), PARAMS, KEY).rule == ()
    for data, rule in (
        ((X, T, ONES), RULE),
        ((X.astype(float), T), RULE),
        ((X, LABELS), CLASSES),
        ((X, T / 2), ONE_HOT),
    ):
        assert fit(data, rule, validation=data, callback=print)[1].loss.shape == (1,)
    assert many()[1].loss.shape == (3, 1)
