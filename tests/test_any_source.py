"""`fnn.as_source`: statistics of any loss, held against `vmap(grad)`."""

import dataclasses
from functools import partial

import any_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from any_cases import CASES
from any_models import MODELS

import fnn
from fnn import losses, per_example, rules
from fnn.verify import check_layer


def by_vmap(case):
    """Losses and gradients of every example, by JAX."""
    f = jax.value_and_grad(case.loss, allow_int=True)
    mapped = jax.jit(jax.vmap(f, (None, *[0] * len(case.batch))))
    values, grads = mapped(case.params, *case.batch)
    rows = []
    for leaf in jax.tree.leaves(grads):
        if leaf.dtype != jax.dtypes.float0:
            rows.append(np.asarray(leaf).astype(np.float64).reshape(len(values), -1))
    return np.asarray(values).astype(np.float64), np.concatenate(rows, 1)


def check_feedback(case):
    """Of a model as a layer: `check_layer` passes, with the params as feedback.

    They are copies, so that the error goes back through `rewire`.
    """
    x, *others = case.batch
    first = jax.tree.map(lambda a: a[0], others)
    layer = fnn.as_layer(lambda params, x: case.loss(params, x, *first)[None])
    copies = jax.tree.map(jnp.array, case.params)

    def backward(params, *operands):
        return layer.backward(copies, *operands)

    rewired = dataclasses.replace(layer, backward=backward)
    report = check_layer(rewired, x[:1], key=jax.random.key(0), params=case.params)
    wrong = {leaf.against for leaf in report.leaves if leaf.hint}
    # differences of the loss say little where `jax.nn.dot_product_attention` rounds to float32
    assert wrong <= ({"adjoint identity"} if case.name == "nnx_transformer" else set()), report


def flat(tree, params):
    """The leaves of a tree as one row, or as one for each example; those of real numbers only."""
    rows = []
    leaves = jax.tree.leaves(params)
    for leaf, p in zip(jax.tree.leaves(tree), leaves, strict=True):
        if jnp.issubdtype(p.dtype, jnp.floating):
            lead = leaf.shape[: leaf.ndim - p.ndim]
            rows.append(np.asarray(leaf).astype(np.float64).reshape(*lead, -1))
    return np.concatenate(rows, -1)


def statistics(case, source):
    """All statistics from one call of the source, in one program."""
    weights = jnp.linspace(0.5, 1.5, any_cases.EXAMPLES)

    @jax.jit
    def f(params, *batch):
        values, factors = source(params, *batch)
        count = values.shape[0]
        w = weights[:count].astype(jnp.float32 if values.dtype == jnp.float32 else jnp.float64)

        def once(params, *batch):
            return values, factors

        return {
            "values": values,
            "gradients": per_example.gradients(once)(params, *batch),
            "norms": per_example.norms(once)(params, *batch),
            "clipped": per_example.clipped_gradient(once, 0.5)(params, *batch, weights=w).gradient,
            "moments": tuple(per_example.moments(once)(params, *batch, weights=w)),
            "gram": per_example.gram(once)(params, *batch),
        }, w

    return f(case.params, *case.batch)


def expected(values, g, w):
    """The same from the gradients `g [batch, numbers]`."""
    w = np.asarray(w).astype(np.float64)
    norms = np.linalg.norm(g, axis=1)
    share = w / w.sum()
    scale = share * np.minimum(1, 0.5 / np.maximum(norms, 1e-300))
    mean = share @ g
    return {
        "values": values,
        "gradients": g,
        "norms": norms,
        "clipped": scale @ g,
        "moments": (mean, share @ (g - mean) ** 2),
        "gram": g @ g.T,
    }


def check(case):
    """All statistics are those of the gradients by `vmap(grad)`."""
    source = fnn.as_source(case.loss, fallback="allow")
    values, g = by_vmap(case)
    found, w = statistics(case, source)
    right = expected(values, g, w)
    found["gradients"] = flat(found["gradients"], case.params)
    found["clipped"] = flat(found["clipped"], case.params)
    found["moments"] = tuple(flat(m, case.params) for m in found["moments"])
    sizes = {"moments": (np.abs(g).max(), np.abs(g).max() ** 2)}
    for name, one in right.items():
        pairs = zip(found[name], one, sizes[name], strict=True) if name == "moments" else None
        for a, b, size in pairs or [(np.asarray(found[name]), one, np.abs(one).max())]:
            assert a.shape == b.shape, name
            np.testing.assert_allclose(a, b, rtol=0, atol=case.tolerance * size, err_msg=name)
    report = per_example.report(source, case.params, *case.batch)
    assert {path: report[path] for path in case.kinds} == case.kinds


@pytest.mark.parametrize("name", CASES)
def test_statistics_of_a_loss_are_those_of_its_gradients(name, x64):
    case = CASES[name]()
    check(case)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_an_unmodified_model(name, x64):
    try:
        case = MODELS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    dtypes, ranks = ("standard", "allow") if case.standard else ("strict", "raise")
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        check(case)
        check_feedback(case)


NET = fnn.mlp((4, 5, 3), activation="tanh")
PARAMS = NET.init(jax.random.key(0))


def loss_of_net(params, x, target):
    """The loss of one example of `NET`."""
    y = NET.apply(params, x[None])
    return losses.l2_loss.value(y, target[None])[0]


def rows(count=6):
    x = jax.random.normal(jax.random.key(1), (count, 4))
    return x, jax.random.normal(jax.random.key(2), (count, 3))


@pytest.mark.parametrize("rule", [rules.private_sgd, rules.per_example_sgd])
def test_rules_on_gradients_of_examples_take_a_source(rule):
    ours = rule(fnn.as_source(loss_of_net))
    right = rule(NET, losses.l2_loss)
    state = right.init(jax.random.key(3), PARAMS)
    x, targets = rows()
    weights = jnp.array([1.0, 0, 1, 1, 1, 1])
    x = x.at[1].set(jnp.nan)
    one = jax.jit(ours.value_and_grad)(PARAMS, state, x, targets, weights)
    other = jax.jit(right.value_and_grad)(PARAMS, state, x, targets, weights)
    for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(other[:2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_fit_trains_a_private_rule_of_a_source(as_users_run):
    data = rows(20)
    rule = rules.private_sgd(fnn.as_source(loss_of_net), noise_multiplier=0.1, batch_size=5)
    options = {"epochs": 5, "batch_size": 5, "key": jax.random.key(4)}
    _, history = fnn.fit(rule, optax.adam(0.03), PARAMS, data, **options)
    assert history.loss[-1] < history.loss[0]
    with pytest.raises(TypeError, match="no outputs to measure"):
        fnn.evaluate(rule, PARAMS, data)


def test_a_setting_in_the_place_of_the_loss_is_refused():
    with pytest.raises(TypeError, match="A source takes no loss: name the settings"):
        rules.private_sgd(fnn.as_source(loss_of_net), 1.0)


def test_whole_numbers_among_params_do_not_move():
    def loss(params, x):
        return (x @ params["w"]).sum() * params["step"].astype(jnp.float32)

    params = {"w": jnp.ones((4, 2)), "step": jnp.int32(3)}
    rule = rules.private_sgd(fnn.as_source(lambda params, x, _: loss(params, x)))
    state = rule.init(jax.random.key(0), params)
    _, grads, _ = rule.value_and_grad(params, state, *rows())
    assert grads["step"].dtype == jnp.int32
    assert grads["step"] == 0


def test_a_wrong_loss_is_refused():
    def ask(loss, *batch, **options):
        fnn.as_source(loss, **options)(jnp.ones((4, 3)), *batch)

    x, _ = rows()
    for loss in (lambda w, x: (x.sum(), x), lambda w, x: x @ w, lambda w, x: 3):
        with pytest.raises(TypeError, match="one real number"):
            ask(loss, x)
    with pytest.raises(TypeError, match=r"an array \(1,\)"):
        ask(lambda w, x: x.sum(), x, batched=True)
    with pytest.raises(ValueError, match="sums over an axis of examples"):
        ask(lambda w, x: jax.lax.pmean((x @ w).sum(), "batch"), x)
    with pytest.raises(ValueError, match="one length"):
        ask(lambda w, x, y: (x @ w).sum(), x, x[:2])
    with pytest.raises(TypeError, match="`params` is complex"):
        fnn.as_source(lambda w, x: jnp.abs(x @ w).sum())(jnp.ones((4, 3), complex), x)
    with pytest.raises(ValueError, match="no parameter"):
        per_example.norms(fnn.as_source(lambda w, x: x.sum()))((), x)


def product_by_hand(w, x, y):
    """A product that is no product to JAX."""
    return jnp.sum(w * x[:, None] * y[None, :])


def test_a_gradient_that_is_written_out_warns_or_raises():
    batch = rows()
    w = jnp.ones((4, 3))
    with pytest.warns(UserWarning, match="`params`: PerExample written out at mul"):
        fnn.as_source(product_by_hand)(w, *batch)
    with pytest.raises(ValueError, match="Accept it with `fallback='allow'`"):
        fnn.as_source(product_by_hand, fallback="raise")(w, *batch)
    values, _ = fnn.as_source(product_by_hand, fallback="allow")(w, *batch)
    assert values.shape == (6,)


def test_a_batched_loss_that_couples_examples_is_found():
    def loss(w, x, normalise):
        y = x @ w
        if normalise:
            y = y - y.mean(0)
        return (y**2).sum(1)

    x, _ = rows()
    w = jnp.ones((4, 3))
    per_example.check_batched(partial(loss, normalise=False), w, x)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="couples the examples"):
        per_example.check_batched(partial(loss, normalise=True), w, x)


MASK = jnp.asarray(np.tri(5, dtype=bool))
HALF = jnp.asarray(np.tri(5, 5, 1) + 0.5)


def squares(y):
    return (y**2).sum()


def stack(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def descend(w):
    """A weight that steps of a training have made."""
    for _ in range(8):
        w = w - jnp.tanh(w).sum() * jnp.sin(w)
    return w


WRITTEN = "PerExample written out at scan"

MAPS = {
    "mask": (lambda w, x: squares(x @ jnp.where(MASK, w, jnp.zeros_like(w))), "Mapped(Outer)"),
    "tril": (lambda w, x: squares(x @ jnp.tril(w)), "Mapped(Outer)"),
    "cumsum": (lambda w, x: squares(x @ jnp.cumsum(w, 0)), "Mapped(Outer)"),
    "reverse": (lambda w, x: squares(x @ w[::-1]), "Outer"),
    "jit": (jax.jit(lambda w, x: squares(x @ jnp.tanh(w))), "Mapped(Outer)"),
    "critic": (lambda w, x: (jnp.tanh(x @ w) @ w).sum(), "Outer"),
    "steps": (lambda w, x: squares(jnp.tanh(x @ descend(w))), None),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_weight_that_is_made_of_params_alone_is_a_linear_map(name, x64):
    loss, kind = MAPS[name]
    w, x = jax.random.normal(jax.random.key(0), (2, 5, 5), jnp.float64)
    case = any_cases.AnyCase(name, loss, w / 3, (x,), {} if kind is None else {"": kind})
    check(case)
    report = per_example.report(fnn.as_source(loss, fallback="raise"), w, x)
    assert len(report[""]) < 200


def test_a_table_in_a_table(x64):
    def loss(w, i, x):
        return squares(jnp.take(jnp.take(w, i[0], axis=0), i[1], axis=0) * x) + squares(w[i[1]][2])

    w = jax.random.normal(jax.random.key(0), (3, 4, 5), jnp.float64)
    i = jnp.array([[0, 1], [2, 2], [1, 0], [0, 1]])
    x = jax.random.normal(jax.random.key(1), (4, 5), jnp.float64)
    check(any_cases.AnyCase("tables", loss, w, (i, x), {}))


@pytest.mark.parametrize("first", [0, 1])
def test_a_recurrent_weight_that_is_written_out_is_reported(first):
    def loss(w, x, outer):
        def step(h, _):
            parts = [
                lambda: jnp.tanh(h @ jnp.where(MASK, w, 0) + x),
                lambda: (w * outer).sum(0),
            ]
            return parts[first]() + parts[1 - first](), None

        return squares(jax.lax.scan(step, x, None, length=2)[0])

    w, x = jnp.ones((5, 5)), jnp.ones((4, 5))
    source = fnn.as_source(loss, fallback="allow")
    assert per_example.report(source, w, x, jnp.ones((4, 5, 5)))[""] == WRITTEN


@pytest.mark.parametrize("layers", [3, 4])
def test_stacked_layers_behind_a_map_or_in_a_sum(layers, x64):
    w = jax.random.normal(jax.random.key(0), (layers, 5, 5), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (4, 5), jnp.float64)
    factors = jnp.linspace(0.5, 1, layers)[:, None, None] * HALF.astype(jnp.float64)[None]
    for loss in (
        lambda w, x: squares(stack(w * factors, x)),
        lambda w, x: squares(stack(w, x)) + squares(x @ w[0]) + 0.1 * squares(w),
    ):
        check(any_cases.AnyCase("stack", loss, w, (x,), {}))


def test_a_clipped_sum_is_within_its_bound_where_maps_cancel():
    w, v = jax.random.normal(jax.random.key(0), (2, 64, 64))
    x, c = jax.random.normal(jax.random.key(1), (2, 1, 64))
    rows = jnp.stack([x, -x * (1 + 1e-4)], 1)
    for loss, a in (
        (lambda w, x, c: 1e7 * ((x @ w) @ c - 1.00001 * ((x @ (w * v)) @ (c / 1.0))), x),
        (lambda w, x, c: 1e7 * ((x @ (w * v)) * c[None]).sum(), rows),
        (
            lambda w, x, c: (
                1e7 * ((x @ w) @ c - (1 + 1e-5) * (w * v / v * x[:, None] * c[None]).sum())
            ),
            x,
        ),
    ):
        source = fnn.as_source(loss, fallback="allow")
        clipped = per_example.clipped_gradient(source, 0.5, reduction="sum")
        found = jax.jit(lambda *b, clipped=clipped: clipped(w, *b).gradient)(a, c)
        norm = np.linalg.norm(np.asarray(found).astype(np.float64))
        assert norm <= 0.5 * (1 + 1e-6)


def test_a_gradient_has_the_dtype_of_its_parameter(as_users_run):
    def loss(w, x):
        return squares((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32))

    w = jnp.ones((4, 2))
    gradients = per_example.gradients(fnn.as_source(loss))(w, rows()[0])
    assert gradients.dtype == jnp.float32


def test_what_all_examples_share_counts_nothing_where_none_counts():
    source = fnn.as_source(lambda w, x: squares(w) * x[0])
    clipped = per_example.clipped_gradient(source, 1.0)
    assert not clipped(jnp.full((2, 2), jnp.inf), rows()[0]).gradient.any()


def test_a_source_in_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    source = fnn.as_source(loss_of_net)

    def statistics(params, x, targets):
        found = per_example.clipped_gradient(source, 0.5)(params, x, targets)
        total = jax.lax.pmean(found.gradient, "data")
        return per_example.norms(source)(params, x, targets), total

    parts = jax.shard_map(
        statistics,
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=(spec("data"), spec()),
    )
    norms, total = jax.jit(parts)(PARAMS, *rows(4))
    np.testing.assert_allclose(norms, per_example.norms(source)(PARAMS, *rows(4)), rtol=1e-5)
    whole = per_example.clipped_gradient(source, 0.5)(PARAMS, *rows(4)).gradient
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
