"""`fnn.as_source`: statistics of any loss, held against `vmap(grad)`."""

import any_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import CASES
from any_models import MODELS

import fnn
from fnn import per_example


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
    if not case.standard:
        check(case)
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check(case)
