"""Data at the door: checked by value once, before training begins, and the order of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import _validate
from fnn.factors import widen
from fnn.rules.private_sgd import CUT_OFF
from fnn.types import Key, Params, Rule

# (seed, examples, batch_size) -> (rows, present), as `shuffled_batches`
Sampler = Callable[[Any, int, int], tuple[Any, Any]]
Batch = tuple[Any, Any, Any]  # x, targets, weights; None without weights


def check_data(
    rule: Rule,
    params: Params,
    data: Any,
    *,
    batch_size: int | None = None,
    name: str = "data",
) -> Batch:
    """Checks data where they enter, values included, and puts them on the device.

    Args:
        rule: its loss says what targets may be.
        params: of the rule's net, or their shapes.
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]`; x may be a tree
            of such arrays.
        batch_size: at most the number of examples, if given.
        name: what errors call the tuple.

    Returns:
        `(x, targets, weights)`; weights None where there are none, else float32 at least.

    Raises:
        TypeError, ValueError: not a tuple of arrays of one length; no example, or fewer than a
            batch; NaN or Inf (with row and column); targets that the loss does not take; weights
            that are negative, all zero or too small; params of another net; an index that an
            embedding does not have.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> check_data(rule, net.init(jax.random.key(0)), (jnp.ones((2, 3)), jnp.array([0, 2])))
    Traceback (most recent call last):
    ValueError: `targets` must be labels in 0 ... 1 for 2 outputs, got 2 in row 1. Labels that count
        from 1? Pass `targets - 1`.
    """
    _validate.is_params(params)
    batch = check_values(data, name)
    x, targets, weights = batch
    rows = targets.shape[0]
    if batch_size is not None and batch_size > rows:
        raise ValueError(
            f"`batch_size` is {batch_size} but `{name}` has only {rows} examples. "
            f"Pass at most {rows}."
        )
    if weights is not None and not (weights > 0).any():
        raise ValueError("`weights` must not be all 0: no example would count.")
    check_targets(rule, trace_predict(rule, params, x).out_info, targets)
    _check_indices(rule, params, x)
    return jax.tree.map(jnp.asarray, batch)


def check_values(data: Any, name: str) -> Batch:
    """Raises unless `data` is a tuple of arrays of one length that JAX holds, without NaN or Inf.

    Args:
        data: `(x, targets)` or `(x, targets, weights)`.
        name: what errors call it.

    Returns:
        `(x, targets, weights)` as they came, but weights in float32 at least; None without.
    """
    tuples = isinstance(data, tuple) and any(isinstance(part, tuple) for part in data[1:])
    if tuples or not (isinstance(data, tuple) and len(data) in (2, 3)):
        came = f"a tuple of {len(data)}" if isinstance(data, tuple) else type(data).__name__
        mend = " A tuple of batches? Pass a list of them." if tuples else ""
        raise TypeError(
            f"`{name}` must be a tuple (x, targets) or (x, targets, weights) of arrays, "
            f"got {came}.{mend}"
        )
    x, targets = data[:2]
    weights = data[2] if len(data) == 3 else None
    parts = []
    for path, leaf in leaves_of(x):
        known = hasattr(leaf, "dtype")
        parts.append((f"x{jax.tree_util.keystr(path)}", leaf) if known else ("x", x))
    parts.append(("targets", targets))
    if weights is not None:
        parts.append(("weights", weights))
    rows = None
    for part, value in parts:
        rows = _check_array(part, value, rows)
    if weights is not None:
        weights = _check_weights(weights, rows)
    return x, targets, weights


def leaves_of(x: Any) -> list[tuple[Any, Any]]:
    """Path and value of every array of an input."""
    return jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda leaf: hasattr(leaf, "dtype"))


def trace_predict(rule: Rule, params: Params, x: Any) -> jax.stages.Traced:
    """The program of a net, from shapes alone; raises where x does not fit the params.

    Its `out_info` is the shape and dtype of the outputs. JAX traces it once for equal shapes.
    """

    def shape(leaf):
        dtype = leaf.dtype if isinstance(leaf, jax.Array) else _validate.canonical_dtype(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.jit(rule.predict).trace(params, jax.tree.map(shape, x))


def check_targets(rule: Rule, outputs: Any, targets: Any) -> None:
    """Raises unless the loss takes the targets, for outputs of such a shape."""
    rule.loss.check(outputs, targets)  # as given: JAX may keep fewer bits
    _validate.fits("targets", targets)


def _check_array(name, value, rows):
    """Raises unless `value` has `rows` rows, at least one, of numbers; returns how many."""
    _validate.is_array(name, value)
    if name != "targets":  # which `check_targets` looks at, with the loss's own words
        _validate.fits(name, value)
    if value.ndim < 1:
        raise ValueError(f"`{name}` is a single number, expected an array with a row per example.")
    if rows is not None and value.shape[0] != rows:
        raise ValueError(f"`{name}` has {value.shape[0]} rows but `x` has {rows}: one per example.")
    if value.size == 0:
        shape = tuple(value.shape)
        raise ValueError(f"`{name}` is empty, shape {shape}; expected at least one example.")
    _validate.finite(name, value)
    return value.shape[0]


def _check_weights(weights, examples):
    """The weights in float32 at least; raises unless there is one for each example, at least 0."""
    _validate.per_example("weights", weights, examples)
    weights = widen(weights)
    w = np.asarray(weights)
    if (w < 0).any():
        row = int(w.argmin())
        raise ValueError(f"`weights` must be at least 0, got {w[row]} in row {row}.")
    smallest = float(jnp.finfo(_float_of(w)).tiny)
    lost = (w > 0) & (w < smallest)
    if lost.any():
        row = int(lost.argmax())
        raise ValueError(
            f"`weights` must be 0 or at least {smallest:.2g}, got {w[row]} in row {row}, which XLA "
            "takes for 0. Scale them: a mean does not change."
        )
    return weights


def _float_of(w):
    """The dtype in which weights are multiplied."""
    dtype = _validate.canonical_dtype(w)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _check_indices(rule, params, x):
    """Raises where the net has no finite output for the largest or smallest whole number in x."""
    whole = [leaf for _, leaf in leaves_of(x) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    shapes = any(isinstance(p, jax.ShapeDtypeStruct) for p in jax.tree.leaves(params))
    if not whole or shapes:
        return
    rows = set()
    for leaf in whole:
        by_row = np.asarray(leaf).reshape(leaf.shape[0], -1)
        rows |= {int(by_row.max(1).argmax()), int(by_row.min(1).argmin())}
    found = sorted(rows)
    some = jax.tree.map(lambda a: jnp.asarray(a[np.array(found)]), x)
    outputs = np.asarray(jax.jit(rule.predict)(params, some).astype(jnp.float32))
    for row, output in zip(found, outputs, strict=True):
        if not np.isfinite(output).all():
            raise ValueError(
                f"`x` has whole numbers in row {row} for which the outputs of the net are not "
                "finite. An index that an embedding does not have?"
            )


def shuffled_batches(
    seed: Any, examples: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """One epoch's order: shuffled row numbers, and which of them are examples.

    Drawn on the host by NumPy's generator: ten times faster than a sort by XLA's CPU, and the same
    on every device.

    Args:
        seed: what `np.random.default_rng` takes; `fit` draws one per epoch from its key by
            `epoch_seeds`.
        examples: how many there are.
        batch_size: how many a step takes.

    Returns:
        `(rows [steps, batch], present [steps, batch])`: 1 for an example, 0 for what fills up the
        last batch; None in its place where every batch is full.

    >>> rows, present = shuffled_batches(0, 5, 2)
    >>> sorted(rows.ravel()[:5].tolist()), present[-1].tolist()
    ([0, 1, 2, 3, 4], [1.0, 0.0])
    """
    order = np.random.default_rng(seed).permutation(examples).astype(np.int32)
    missing = -examples % batch_size
    if not missing:
        return order.reshape(-1, batch_size), None
    rows = np.append(order, np.zeros(missing, np.int32)).reshape(-1, batch_size)
    return rows, (np.arange(rows.size) < examples).astype(np.float32).reshape(rows.shape)


def poisson_batches(seed: Any, examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch of Poisson samples.

    Every step takes every example independently with probability q = batch_size / examples.

    The accounting of `fnn.rules.private_sgd` holds for such samples. The number n of examples in a
    step is Binomial(examples, q) with the mean `batch_size` and the variance
    v = batch_size (1 - q). Bernstein's inequality bounds its tail:

        P(n >= batch_size + t) <= exp(-t^2 / (2 (v + t / 3)))

    The bound is 1e-12 at t = l / 3 + sqrt(l^2 / 9 + 2 l v) with l = ln 1e12. So every step has
    `min(examples, floor(batch_size + t))` rows. With a probability below 1e-12 a step draws more,
    and then it leaves out the surplus. A guarantee's delta grows by at most 1 + e^epsilon times
    that probability.

    Args:
        seed: what `np.random.default_rng` takes.
        examples: how many there are.
        batch_size: the *expected* number of examples in a step, at most `examples`.

    Returns:
        `(rows [steps, size], present [steps, size])`: distinct row numbers and 1, then row 0 and 0
        for what fills up. `steps = ceil(examples / batch_size)`; the size depends on `examples` and
        `batch_size` alone.

    Raises:
        ValueError: `batch_size` is larger than `examples`.

    >>> rows, present = poisson_batches(0, 1000, 100)
    >>> rows.shape, int(present[0].sum())
    ((10, 180), 92)
    """
    if batch_size > examples:
        raise ValueError(
            f"`batch_size` is {batch_size} but there are only {examples} examples. "
            f"Pass at most {examples}."
        )
    rng, q, tail = np.random.default_rng(seed), batch_size / examples, -np.log(CUT_OFF)
    surplus = tail / 3 + np.sqrt(tail**2 / 9 + 2 * tail * batch_size * (1 - q))
    shape = -(-examples // batch_size), min(examples, int(batch_size + surplus))
    counts = np.minimum(rng.binomial(examples, q, shape[0]), shape[1])
    rows = np.zeros(shape, np.int32)
    for step, count in enumerate(counts):
        rows[step, :count] = rng.choice(examples, count, replace=False, shuffle=False)
    return rows, (np.arange(shape[1])[None] < counts[:, None]).astype(np.float32)


def drawn(
    sampler: Sampler, seed: Any, examples: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `sampler` returns, its row numbers checked.

    A row that is not there would be read without a word.
    """
    found = sampler(seed, examples, batch_size)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            "`sampler` must return a tuple (rows [steps, size], present of that shape or None), "
            f"got {found!r:.80}."
        )
    rows = np.asarray(found[0])
    present = None if found[1] is None else np.asarray(found[1])
    if not rows.size or rows.dtype.kind not in "iu":
        raise ValueError(
            f"`sampler` must return whole row numbers of at least one step, got {rows.dtype} "
            f"{rows.shape}."
        )
    if np.ndim(rows) != 2 or (present is not None and np.shape(present) != np.shape(rows)):
        came = f"{np.shape(rows)} and {None if present is None else np.shape(present)}"
        raise ValueError(
            "`sampler` must return rows [steps, size] and present of that shape, or None; "
            f"got {came}."
        )
    if np.size(rows) and (np.min(rows) < 0 or np.max(rows) >= examples):
        raise ValueError(
            f"`sampler` must return rows in 0 ... {examples - 1}, "
            f"got {np.min(rows)} ... {np.max(rows)}."
        )
    return rows, present


def epoch_seeds(key: Key, epochs: int) -> np.ndarray:
    """A seed for every epoch from one key, `[epochs, words]` on the host.

    >>> epoch_seeds(jax.random.key(0), 3).shape
    (3, 2)
    """
    return np.asarray(jax.random.key_data(jax.random.split(key, epochs)))


def own_batches(
    data: tuple[Any, ...], batch_size: int, key: Key, epochs: int
) -> Callable[[int], Iterator[tuple[Any, ...]]]:
    """The batches of `fit`, of each of which every process takes its own rows alone.

    Args:
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]` on the host, the
            same in every process; such as `numpy.memmap`, of which only the rows that are taken are
            read.
        batch_size: of `fit`, all processes together.
        key: of `fit`; the order of the examples is then the one in which `fit` goes through arrays.
        epochs: of `fit`.

    Returns:
        A function of the epoch, for `fit`'s `data`, that returns an iterator of `(x, targets,
        weights)`.

    >>> batches = own_batches((np.arange(5.0), np.arange(5)), 2, jax.random.key(0), epochs=1)
    >>> [weights.tolist() for x, targets, weights in batches(0)]
    [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    """
    seeds, examples = epoch_seeds(jax.random.split(key)[1], epochs + 1), data[0].shape[0]
    each = -(-batch_size // jax.process_count())
    own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def batches(epoch: int) -> Iterator[tuple[Any, ...]]:
        rows, present = shuffled_batches(seeds[epoch], examples, batch_size)
        present = np.ones(rows.shape, np.float32) if present is None else present
        missing = ((0, 0), (0, each * jax.process_count() - batch_size))
        for r, w in zip(
            np.pad(rows, missing)[:, own], np.pad(present, missing)[:, own], strict=True
        ):
            yield data[0][r], data[1][r], w * data[2][r] if len(data) == 3 else w

    return batches


def check_rule(rule: Any) -> None:
    """Raises a TypeError unless `rule` is a `Rule`."""
    if not isinstance(rule, Rule):
        raise TypeError(
            f"`rule` must be a Rule, got {rule!r}. Make one: `fnn.rules.backprop(net, loss)`."
        )


def check_batches(data: Any, epochs: int) -> None:
    """Raises unless `data` gives batches in every epoch.

    An iterable of batches must last for all epochs. A function of the epoch returns an iterable.
    """
    arrays = isinstance(data, list) and any(hasattr(part, "shape") for part in data)
    single = hasattr(data, "shape") or isinstance(data, (str, Mapping))
    if arrays or single or not (callable(data) or isinstance(data, Iterable)):
        came = (
            f"a list of {len(data)} arrays. Pass `tuple(data)`" if arrays else type(data).__name__
        )
        expected = (
            "a tuple (x, targets) of arrays, an iterable of such tuples, "
            "or a function of the epoch that returns one"
        )
        raise TypeError(f"`data` must be {expected}; got {came}.")
    if epochs > 1 and not callable(data) and iter(data) is data:
        raise ValueError(
            f"`data` is {type(data).__name__}, which can be gone through only once, "
            f"but `epochs` is {epochs}. "
            "Pass a list, or a function of the epoch that returns one: `lambda epoch: ...`."
        )


def check_record(record: Any, every: Any) -> None:
    """Raises unless `record` is a function that can be compiled in, and its stride a number."""
    if record is not None:
        form = "(params, rule_state, x, targets, weights) -> tree of arrays"
        _validate.is_function("record", record, form)
        _validate.hashable("record", record)
    _validate.positive("record_every", every, whole=True)


def check_settings(rule: Any, optimizer: Any, batch_size: Any, callback: Any) -> None:
    """Raises unless rule, optimiser, the size of a batch and the callback are valid."""
    check_rule(rule)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"`optimizer` must be an optax optimiser, got {optimizer!r}. "
            "Make one: `optax.sgd(0.1)`."
        )
    for name, value in (("rule", rule), ("optimizer", optimizer)):
        _validate.hashable(name, value)
    _validate.positive("batch_size", batch_size, whole=True)
    if callback is not None:
        _validate.is_function("callback", callback, "(epoch, metrics) -> stop")


def check_many(
    rule: Any, optimizer: Any, batch_size: Any, callback: Any, keys: Any, rates: Any
) -> None:
    """Raises unless the arguments of `fit_many` are valid."""
    if not (hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"`keys` must be an array of keys from `jax.random.split(key, nets)`, got {keys!r:.80}."
        )
    if keys.ndim != 1 or not keys.size:
        raise ValueError(
            f"`keys` must be one key per net, [nets], got shape {keys.shape}. "
            "Pass `jax.random.split(key, nets)`."
        )
    if rates is None:
        check_settings(rule, optimizer, batch_size, callback)
        return
    _validate.is_float("learning_rates", rates)
    if not callable(optimizer):
        raise TypeError(
            "`optimizer` must be a function rate -> optimiser where `learning_rates` are given, "
            f"got {optimizer!r}. Pass `optax.sgd`."
        )
    if rates.shape != keys.shape or not bool(((rates > 0) & jnp.isfinite(rates)).all()):
        raise ValueError(
            f"`learning_rates` must be one finite number above 0 per key, {keys.shape}, "
            f"got {rates}."
        )
    check_settings(rule, optimizer(0.1), batch_size, callback)


def check_best(checkpoint: Any, rule: Rule, validation: Any) -> None:
    """Raises unless the metric by which the best checkpoint is chosen will be there."""
    best = getattr(checkpoint, "best", None)
    measured = ["loss"]
    if validation is not None:
        measured.append("validation_loss")
        if rule.loss.correct is not None:
            measured.append("validation_accuracy")
    if best is not None and best not in measured:
        raise ValueError(
            f"`best` of `checkpoint` must be a metric of this training, {', '.join(measured)}; "
            f"got {best!r}."
        )


def check_both(
    rule: Rule, params: Params, data: Any, validation: Any, batch_size: int, epochs: int
) -> tuple[Any, Any]:
    """The data and the validation data, checked; batches of an iterable are as they come."""
    if isinstance(data, tuple):
        data = check_data(rule, params, data, batch_size=batch_size)
    else:
        check_batches(data, epochs)
    return data, check_validation(rule, params, validation)


def check_validation(rule: Rule, params: Params, validation: Any) -> Any:
    """The validation data, checked; None without."""
    if validation is None:
        return None
    with _validate.inside("`validation`"):
        return check_data(rule, params, validation, name="validation")
