"""Evolution: the loss of whole nets around the parameters, by forward passes alone, says where to
go. No backward pass, no derivative.

Parameters are one vector theta `[d]`, noise is a matrix E `[m, d]` of independent N(0, 1) with rows
e_k, and f(theta) is the mean loss over the batch; all n members of a generation are judged on the
same batch.

    evolution_strategies   members theta + std e_k, theta - std e_k (n = 2m);    grads = E^T (s+ -
    s-) / (n std)
    snes                   members theta + sigma (.) e_k (n = m);                grads = -sigma (.)
    (E^T u)
                           sigma <- sigma (.) exp(eta / 2 (E (.) E - 1)^T u),    eta = (3 + log d) /
                           (5 sqrt d)
    genetic_algorithm      children = a parent + std e_k (n = m = lambda);       the best mu are the
    next parents; grads = theta - best

s are the members' losses ("raw"), or their ranks 0 ... n - 1, best first, as rank / (n - 1) - 1/2
("centred_ranks"). u_k is the utility max(0, log(n/2 + 1) - log k) / sum_j max(0, log(n/2 + 1) - log
j) - 1/n of the k-th best. Members of equal loss share the mean of their ranks or utilities: a
generation without differences moves nothing. A loss that is not finite ranks last; with "raw" its
pair is left out.

With "raw" and std -> 0, grads of evolution_strategies become the forward gradient, mean over k of
(grad f . e_k) e_k: right on average, but of a cosine with the gradient of only about sqrt(m / (m +
d + 1)). With larger std it is the gradient of f smoothed by N(0, std^2).

Cost of a step: n forward passes, and one more for the value, the loss of the unperturbed parameters
(genetic_algorithm: of the best). Members are judged `chunk` at a time, and memory is that of so
many members, their rows of E and their forward passes (genetic_algorithm: and of its parents, old
and new): the rows are drawn a second time, from the same keys, to be added up, as the workers of
Salimans et al. do. The chunk changes results by rounding alone.

Source: Salimans, Ho, Chen, Sidor, Sutskever (2017), arXiv:1703.03864, algorithm 1 and section 2.1
(there F_i = -s_i, sigma = std); Wierstra, Schaul, Glasmachers, Sun, Peters, Schmidhuber (2014),
arXiv:1106.4487, and Schaul, Glasmachers, Schmidhuber (2011), doi:10.1145/2001576.2001692, for SNES;
Rechenberg (1973) and Schwefel (1977) for (mu, lambda); lecture 003 (evolutionary algorithms).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import _validate
from fnn.backprop import check_net_and_loss, forward_pass, mean_loss, weighted_mean
from fnn.nets.blocks import Blocks, blocks
from fnn.types import Array, Key, Layer, Loss, Params, Rule, State, at_least_float32


@dataclass(frozen=True, repr=False)
class EvolutionRule(Rule):
    """A `Rule` that can show its population.

    Attributes:
        members: `(params, state) -> tree like params, leaves [members, ...]`: those that
            `value_and_grad` judges if given that state.
    """

    members: Callable[[Params, State], Params]


class SnesState(NamedTuple):
    """What `snes` carries from step to step."""

    key: Key
    std: Params  # sigma, a tree like params, float32 at least


class GeneticState(NamedTuple):
    """What `genetic_algorithm` carries from step to step."""

    key: Key
    parents: Params  # leaves [parents, ...], best first


def evolution_strategies(
    net: Layer,
    loss: Loss,
    *,
    population: int = 128,
    std: float = 0.02,
    fitness: str = "centred_ranks",
    chunk: int | None = 16,
) -> EvolutionRule:
    """OpenAI's evolution strategy.

    Antithetic Gaussian perturbations of all parameters, weighed by their fitness.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        population: members of a generation, an even number: each perturbation is tried with both
            signs.
        std: standard deviation of the perturbations, the same for every parameter.
        fitness: `"centred_ranks"`, which neither an outlier nor the scale of the loss changes; or
            `"raw"`, the losses themselves, whose differences cancel in float32 where `std` is
            small.
        chunk: members judged at a time; few are fastest on a CPU, None, all at once, on an
            accelerator.

    Returns:
        A rule whose state is a key, split at every step; for any optax optimiser. By ranks, grads
        do not get shorter near a minimum: a learning rate that falls lets it settle.

    Raises:
        TypeError, ValueError: an argument cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = evolution_strategies(net, fnn.losses.l2_loss, population=8)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> rule.members(params, state)[-1].w.shape
    (8, 3, 2)
    """
    check_net_and_loss(net, loss)
    _check_members("population", population, std, chunk, pairs=True)
    _validate.one_of("fitness", fitness, ("centred_ranks", "raw"))
    parts, std, ranks = blocks(net), float(std), np.linspace(-0.5, 0.5, population)
    size = max((chunk or population) // 2, 1)  # pairs at a time

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Any = None
    ) -> tuple[Array, Params, Key]:
        value = mean_loss(net, loss)(params, x, targets, weights)
        theta, tree, draw = _flattened(parts, params)
        f = _fitness(net, loss, x, targets, weights)
        state, keys = _split(state, population // 2)

        def judged(key: Key) -> Array:
            e = std * draw(key)
            return jax.vmap(lambda step: f(tree(theta + step)))(jnp.stack([e, -e]))

        losses = lax.map(judged, keys, batch_size=size)  # [pairs, 2]
        finite = jnp.isfinite(losses).all(1)
        if fitness == "raw":
            s, count = jnp.where(finite[:, None], losses, 0.0), 2 * jnp.maximum(finite.sum(), 1)
        else:
            s, count = (
                _by_rank(losses.ravel(), ranks).reshape(losses.shape),
                jnp.asarray(population),
            )
        (grads,) = _totals(
            lambda e: (e,), (s[:, 0] - s[:, 1]).astype(theta.dtype), draw, keys, size
        )
        return value, tree(grads / (std * count.astype(theta.dtype))), state

    def members(params: Params, state: Key) -> Params:
        theta, tree, draw = _flattened(parts, params)
        noise = jax.vmap(draw)(_split(state, population // 2)[1])
        return jax.vmap(lambda e: tree(theta + std * e))(jnp.concatenate([noise, -noise]))

    return EvolutionRule(
        "evolution_strategies", lambda key, params: key, value_and_grad, net.apply, loss, members
    )


def snes(
    net: Layer,
    loss: Loss,
    *,
    population: int | None = None,
    std: float = 0.05,
    chunk: int | None = 16,
) -> EvolutionRule:
    """Separable natural evolution strategies.

    The natural gradient for the mean and for every parameter's own standard deviation.

    Args:
        net, loss: as above.
        population: members of a generation, at least 2; the paper's 4 + floor(3 log d) for d
            parameters, if None.
        std: first standard deviation, of every parameter.
        chunk: as above.

    Returns:
        A rule whose state is a `SnesState`. `optax.sgd(1.0)` makes the paper's update of the mean
        (its eta_mu = 1).

    Raises:
        TypeError, ValueError: an argument cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = snes(net, fnn.losses.l2_loss, std=0.1)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> state.std[-1].w.shape, rule.members(params, state)[-1].w.shape
    ((3, 2), (10, 3, 2))
    """
    check_net_and_loss(net, loss)
    _check_members("population", 4 if population is None else population, std, chunk)
    parts, first = blocks(net), float(std)

    def drawn(state: SnesState, theta: Array) -> tuple[Key, Key]:
        """The next state's key, and every member's."""
        return _split(state.key, population or 4 + math.floor(3 * math.log(theta.size)))

    def init(key: Key, params: Params) -> SnesState:
        return SnesState(
            key, jax.tree.map(lambda p: jnp.full_like(at_least_float32(p), first), params)
        )

    def value_and_grad(
        params: Params, state: SnesState, x: Array, targets: Array, weights: Any = None
    ) -> tuple[Array, Params, SnesState]:
        value = mean_loss(net, loss)(params, x, targets, weights)
        (theta, tree, draw), (sigma, std_tree, _) = (
            _flattened(parts, params),
            _flattened(parts, state.std),
        )
        f = _fitness(net, loss, x, targets, weights)
        key, keys = drawn(state, theta)
        losses = lax.map(
            lambda key: f(tree(theta + sigma * draw(key))), keys, batch_size=chunk or len(keys)
        )
        u = _by_rank(losses, _utilities(len(keys))).astype(theta.dtype)
        for_mean, for_std = _totals(lambda e: (e, e * e - 1), u, draw, keys, chunk or len(keys))
        eta = (3 + math.log(theta.size)) / (5 * math.sqrt(theta.size))
        return (
            value,
            tree(-sigma * for_mean),
            SnesState(key, std_tree(sigma * jnp.exp(eta / 2 * for_std))),
        )

    def members(params: Params, state: SnesState) -> Params:
        (theta, tree, draw), (sigma, _, _) = _flattened(parts, params), _flattened(parts, state.std)
        return jax.vmap(lambda key: tree(theta + sigma * draw(key)))(drawn(state, theta)[1])

    return EvolutionRule("snes", init, value_and_grad, net.apply, loss, members)


def genetic_algorithm(
    net: Layer,
    loss: Loss,
    *,
    parents: int = 8,
    children: int = 128,
    std: float = 0.05,
    chunk: int | None = 16,
) -> EvolutionRule:
    """The plain (mu, lambda) genetic algorithm of the 1960s and 70s: mutation and selection.

    No crossover, no adaptation of `std`.

    Args:
        net, loss: as above.
        parents: mu, how many children become parents; they live in the state, at first as copies of
            the params.
        children: lambda, mutated copies of parents chosen at random, at least `parents`. No parent
            outlives a generation.
        std: standard deviation of a mutation, the same for every parameter.
        chunk: as above.

    Returns:
        A rule whose state is a `GeneticState`. Its value is the best child's loss, the first one's
        among equals. `optax.sgd(1.0)` makes the params the best child, to rounding; evolution goes
        on from the parents in the state, whatever the optimiser makes of the params.

    Raises:
        TypeError, ValueError: an argument cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = genetic_algorithm(net, fnn.losses.l2_loss, parents=2, children=6)
    >>> rule.init(jax.random.key(1), net.init(jax.random.key(0))).parents[-1].w.shape
    (2, 3, 2)
    """
    check_net_and_loss(net, loss)
    _check_members("children", children, std, chunk)
    _validate.positive("parents", parents, whole=True)
    if parents > children:
        raise ValueError(
            f"`parents` must be at most `children`, out of whom they are chosen; got {parents} of {children}."
        )
    parts, std = blocks(net), float(std)

    def init(key: Key, params: Params) -> GeneticState:
        return GeneticState(key, jax.tree.map(lambda p: jnp.stack([p] * parents), params))

    def begun(params: Params, state: GeneticState) -> tuple[Any, ...]:
        _, tree, draw = _flattened(parts, params)
        old = jax.vmap(lambda p: _flattened(parts, p)[0])(state.parents)  # [parents, d]
        state_key, keys = _split(state.key, children + 1)
        seeds = keys[1:], jax.random.randint(keys[0], (children,), 0, parents)
        return state_key, seeds, lambda seed: tree(old[seed[1]] + std * draw(seed[0]))

    def value_and_grad(
        params: Params, state: GeneticState, x: Array, targets: Array, weights: Any = None
    ) -> tuple[Any, ...]:
        key, seeds, child = begun(params, state)
        f = _fitness(net, loss, x, targets, weights)
        losses = lax.map(lambda seed: f(child(seed)), seeds, batch_size=chunk or children)
        first = jnp.argsort(losses)[:parents]  # stable: the first among equals
        chosen = jax.vmap(child)(jax.tree.map(lambda a: a[first], seeds))
        best = jax.tree.map(lambda p: p[0], chosen)
        value = mean_loss(net, loss)(best, x, targets, weights)
        return value, jax.tree.map(jnp.subtract, params, best), GeneticState(key, chosen)

    def members(params: Params, state: GeneticState) -> Params:
        _, seeds, child = begun(params, state)
        return jax.vmap(child)(seeds)

    return EvolutionRule("genetic_algorithm", init, value_and_grad, net.apply, loss, members)


def _flattened(
    parts: Blocks, params: Params
) -> tuple[Array, Callable[[Array], Params], Callable[[Key], Array]]:
    """The params as one vector `[d]`, float32 at least.

    The way back, `vector -> tree` in the dtypes they had; and `key -> a row of E`.

    It goes block by block, so that every way to write the same net has the same vector.
    """
    leaves, tree = jax.tree.flatten(parts.split(params))
    if not leaves:
        raise ValueError(
            "`params` has no arrays, so nothing can evolve. Give the net a layer with parameters, such as `fnn.dense`."
        )
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    dtype = max((at_least_float32(leaf).dtype for leaf in leaves), key=lambda dtype: dtype.itemsize)
    theta = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in leaves])

    def back(vector: Array) -> Params:
        each = zip(
            jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1]), leaves, strict=True
        )
        return parts.join(
            jax.tree.unflatten(
                tree, [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in each]
            )
        )

    return theta, back, lambda key: jax.random.normal(key, theta.shape, dtype)


def _fitness(
    net: Layer, loss: Loss, x: Array, targets: Array, weights: Any
) -> Callable[[Params], Array]:
    """f: the mean loss of a member, float32 at least, since rounding makes ties.

    Infinite where it is not finite, and so the last.
    """

    def f(params: Params) -> Array:
        _, _, values = forward_pass(partial(net.forward, params), loss, x, targets)
        mean = weighted_mean(at_least_float32(values), weights)
        return jnp.where(jnp.isfinite(mean), mean, jnp.inf)

    return f


def _split(key: Key, count: int) -> tuple[Key, Array]:
    """The next state's key, and one for every row of E.

    Of threefry, whose numbers do not depend on how many are drawn at a time.
    """
    state, key = jax.random.split(key)
    return state, jax.random.split(
        jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32"), count
    )


def _totals(
    parts: Callable[[Array], tuple[Array, ...]],
    c: Array,
    draw: Callable[[Key], Array],
    keys: Array,
    size: int,
) -> Any:
    """`c^T` times each part of E, so many rows of it at a time."""
    count, size = len(keys), min(size, len(keys))
    rows = jnp.arange(-(-count // size) * size).reshape(-1, size)

    def block(rows: Array) -> tuple[Array, ...]:
        share = jnp.where(rows < count, c[rows % count], 0.0)  # the last block may be filled up
        return tuple(share @ part for part in parts(jax.vmap(draw)(keys[rows % count])))

    def add(so_far: Any, rows: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, block(rows)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(block, rows[0]))
    return lax.scan(add, zeros, rows)[0]


def _by_rank(losses: Array, table: np.ndarray) -> Array:
    """For every member the entry of the table at its rank, best first.

    Members of equal loss share the mean of theirs. `[n]`.
    """
    first, end = (
        jnp.searchsorted(jnp.sort(losses), losses, side=side) for side in ("left", "right")
    )
    sums = jnp.asarray(np.append(0.0, np.cumsum(table)), losses.dtype)
    shared = (sums[end] - sums[first]) / (end - first).astype(losses.dtype)
    return jnp.where(end - first > 1, shared, jnp.asarray(table, losses.dtype)[first])


def _utilities(count: int) -> np.ndarray:
    """u_1 ... u_n, best first; they add up to 0."""
    raw = np.maximum(0, math.log(count / 2 + 1) - np.log(np.arange(1, count + 1)))
    return raw / raw.sum() - 1 / count


def _check_members(name: str, count: Any, std: Any, chunk: Any, pairs: bool = False) -> None:
    """Raises unless there can be so many members, of such a standard deviation, judged so many at a
    time."""
    _validate.positive("std", std)
    _validate.positive(name, count, whole=True)
    if count < 2 or (pairs and count % 2):
        expected = (
            "an even number, since every perturbation is tried with both signs"
            if pairs
            else "at least 2, to be compared"
        )
        raise ValueError(f"`{name}` must be {expected}; got {count}. Pass {count + 1}.")
    if chunk is not None:
        _validate.positive("chunk", chunk, whole=True)
