"""docs/any-model.md: its programs run, and what it says of kinds and errors is true."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import fnn
from fnn import per_example

PAGE = (Path(__file__).parents[1] / "docs" / "any-model.md").read_text()
PROGRAMS = re.findall(r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)
LIBRARIES = "equinox", "flax", "haiku", "sklearn"


@pytest.fixture(autouse=True)
def as_a_newcomer_has_it():
    """JAX's own defaults: what a reader pastes runs in them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("title", "program"), PROGRAMS, ids=[title for title, _ in PROGRAMS])
def test_a_program_of_the_page_on_any_model_runs(title, program):
    for library in re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE):
        if library in LIBRARIES and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    exec(program, {})


def test_the_page_has_a_program_for_every_library():
    assert len(PROGRAMS) == 5
    imported = set(re.findall(r"^(?:import|from) (\w+)", PAGE, re.MULTILINE))
    assert imported >= {"equinox", "flax", "haiku", "jax"}


X = jnp.arange(12.0).reshape(4, 3) / 10


def of_labels(params, x, labels):
    """A loss of batches that normalises by the batch."""
    z = (x - x.mean(0)) @ params
    return optax.softmax_cross_entropy_with_integer_labels(z, labels)


REFUSED = {
    "other outputs": (lambda w, x: ((x @ w) ** 2, x), TypeError, "must return one real number"),
    "a mean": (lambda w, x: x @ jnp.outer(w, w), TypeError, "must return one real number"),
    "axis_name": (
        lambda w, x: jax.lax.pmean(x, "batch") @ w,
        ValueError,
        "sums over an axis of examples",
    ),
    "complex": (lambda w, x: jnp.abs(x @ w), TypeError, "is complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_page_says_is_refused_is_refused(name):
    loss, error, message = REFUSED[name]
    w = jnp.ones(3, complex if name == "complex" else float)
    assert message in PAGE
    with pytest.raises(error, match=message):
        per_example.norms(fnn.as_source(loss))(w, X)


def test_statistics_of_the_batch_are_found_by_check_batched():
    w, labels = jnp.ones((3, 2)) * jnp.array([1.0, -1]), jnp.zeros(4, int)
    norms = per_example.norms(fnn.as_source(of_labels, batched=True))
    jax.eval_shape(norms, w, X, labels)  # no error, but the numbers are of batches of one
    with pytest.raises(ValueError, match="couples the examples"):
        per_example.check_batched(of_labels, w, X, labels)


def test_a_gate_on_the_input_is_no_fallback_and_one_on_the_weight_is():
    w, x = jnp.ones((30, 30)), jnp.ones((4, 30))

    def on_weight(w, x):
        return jnp.tanh(x @ (w * x[:, None])).sum()

    def on_input(w, x):
        return jnp.tanh((x * x) @ w).sum()

    kind = per_example.report(fnn.as_source(on_weight, fallback="allow"), w, x)[""]
    assert kind == "PerExample written out at mul"
    assert per_example.report(fnn.as_source(on_input), w, x)[""] == "Outer"


def test_a_rule_that_goes_by_blocks_takes_a_chain_of_models():
    part = fnn.as_layer(lambda w, x: jnp.tanh(x @ w), lambda key: jax.random.normal(key, (3, 3)))
    with pytest.raises(ValueError, match="one block"):
        fnn.rules.direct_feedback_alignment(part, fnn.losses.l2_loss)
    net = fnn.serial(part, part)
    rule = fnn.rules.direct_feedback_alignment(net, fnn.losses.l2_loss)
    params = net.init(jax.random.key(0))
    state = rule.init(jax.random.key(1), params)
    value, _, _ = rule.value_and_grad(params, state, X, jnp.zeros((4, 3)))
    assert jnp.isfinite(value)
