"""Evolution: the loss of whole nets around the parameters says where to go. No derivative is taken.

Parameters are one vector theta `[d]`, noise is a matrix E `[m, d]` of independent N(0, 1) with rows
e_k, and f(theta) is the mean loss over the batch, the same batch for all n members of a generation.

    evolution_strategies   members theta + std e_k, theta - std e_k (n = 2m);
                           grads = E^T (s+ - s-) / (n std)
    snes                   members theta + sigma (.) e_k (n = m);
                           grads = -sigma (.) (E^T u),
                           sigma <- sigma (.) exp(eta / 2 (E (.) E - 1)^T u),
                           eta = (3 + log d) / (5 sqrt d)
    genetic_algorithm      children = a parent + std e_k (n = m = lambda);
                           the best mu are the next parents; grads = theta - best

s are the members' losses ("raw"), or their ranks 0 ... n - 1, best first, as rank / (n - 1) - 1/2
("centred_ranks"). u_k is the utility max(0, log(n/2 + 1) - log k) / sum_j max(0, log(n/2 + 1) - log
j) - 1/n of the k-th best. Members of equal loss share their mean rank: a generation without
differences moves nothing. A loss that is not finite ranks last; with "raw" its pair counts 0.

With "raw" and std -> 0, grads of evolution_strategies become the forward gradient, mean over k of
(grad f . e_k) e_k: right on average, but of a cosine with the gradient of only about sqrt(m / (m +
d + 1)). With larger std it is the gradient of f smoothed by N(0, std^2).

Cost of a step: n forward passes, and one more for the value, the loss of the unperturbed parameters
(genetic_algorithm: of the best). Memory is that of `chunk` members, their rows of E and their
forward passes (genetic_algorithm: and of its parents, old and new). The rows are drawn a second
time, from the same keys, to be added up, as the workers of Salimans et al. do. The chunk changes
results by rounding alone.

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
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import rankdata
from optax import tree

from fnn import _validate
from fnn.backprop import check_net_and_loss, forward_pass, forward_with, weighted_mean
from fnn.factors import widen
from fnn.rules._noise import keep_key, normal_like, weighted_sum
from fnn.types import Key, Layer, Loss, Params, Rule, State, by_recipe

Fitness = Literal["centred_ranks", "raw"]


@dataclass(frozen=True, repr=False, eq=False)
class EvolutionRule(Rule):
    """A `Rule` that can show its population.

    Attributes:
        members: `(params, state) -> tree like params, leaves [members, ...]`: the members whose
            losses `value_and_grad` compares if it gets that state.
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


@by_recipe
def evolution_strategies(
    net: Layer,
    loss: Loss,
    *,
    population: int = 128,
    std: float = 0.02,
    fitness: Fitness = "centred_ranks",
    chunk: int | None = 16,
) -> EvolutionRule:
    """OpenAI's evolution strategy.

    Antithetic Gaussian perturbations of all parameters, weighted by their fitness.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        population: members of a generation, an even number: each perturbation comes with both
            signs.
        std: standard deviation of the perturbations, the same for every parameter.
        fitness: `"centred_ranks"`, which neither an outlier nor the scale of the loss changes; or
            `"raw"`, the losses themselves, whose differences cancel in float32 where `std` is
            small.
        chunk: members at a time; few are fastest on a CPU, None, all at once, on an accelerator.

    Returns:
        A rule whose state is a key, split at every step; for any optax optimiser. By ranks, grads
        do not get shorter near a minimum: a learning rate that falls lets it settle.

    Raises:
        TypeError, ValueError: an argument is invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = evolution_strategies(net, fnn.losses.l2_loss, population=8)
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> rule.members(params, state)[-1].w.shape
    (8, 3, 2)
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    """
    _validate.positive("std", std)
    _validate.positive("population", population, whole=True)
    if population % 2:
        raise ValueError(
            "`population` must be an even number, since every perturbation comes with both signs; "
            f"got {population}. Pass {population + 1}."
        )
    _validate.one_of("fitness", fitness, get_args(Fitness))
    step = float(std)  # a NumPy number would widen the arrays

    def generation(params, state):
        state, keys = _split(state, population // 2)
        noise = partial(normal_like, like=params)

        def pair(key):
            shift = tree.scale(step, noise(key))
            above = tree.add(params, shift)
            below = tree.sub(params, shift)
            return jax.tree.map(lambda *both: jnp.stack(both), above, below)

        def update(f, losses, size):
            if fitness == "centred_ranks":
                losses = _ranks(losses) / (population - 1)
            gaps = losses[:, 0] - losses[:, 1]
            gaps = jnp.where(jnp.isfinite(gaps), gaps, 0)
            shares = gaps / (population * step)
            grads = weighted_sum(noise, shares, keys, size)
            return f(params), grads, state

        return keys, pair, update

    pairs = chunk and max(chunk // 2, 1)
    return _rule("evolution_strategies", net, loss, keep_key, generation, pairs, jax.vmap)


@by_recipe
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
        net: any layer.
        loss: any loss that takes its outputs.
        population: members of a generation, at least 2; the paper's 4 + floor(3 log d) for d
            parameters, if None.
        std: first standard deviation, of every parameter.
        chunk: members at a time; None for all at once.

    Returns:
        A rule whose state is a `SnesState`. `optax.sgd(1.0)` makes the paper's update of the mean
        (its eta_mu = 1).

    Raises:
        TypeError, ValueError: an argument is invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = snes(net, fnn.losses.l2_loss, std=0.1)
    >>> params = net.init(jax.random.key(0))
    >>> state, x, targets = rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    >>> state.std[-1].w.shape, rule.members(params, state)[-1].w.shape
    ((3, 2), (10, 3, 2))
    """
    _validate.positive("std", std)
    if population is not None:
        _validate.positive("population", population, whole=True)

    def init(key, params):
        first = jax.tree.map(lambda p: jnp.full_like(widen(p), std), params)
        return SnesState(key, first)

    def generation(params, state):
        d = tree.size(params)
        count = population or 4 + math.floor(3 * math.log(d))
        key, keys = _split(state.key, count)
        noise = partial(normal_like, like=state.std)

        def member(key):
            step = tree.mul(state.std, noise(key))
            return tree.add(params, tree.cast_like(step, params))

        def terms(key):
            e = noise(key)
            excess = jax.tree.map(lambda a: a * a - 1, e)
            return e, excess

        def update(f, losses, size):
            utilities = _utilities(losses)
            for_mean, for_std = weighted_sum(terms, utilities, keys, size)
            eta = (3 + math.log(d)) / (5 * math.sqrt(d))
            grads = jax.tree.map(lambda s, a: -(s * a), state.std, for_mean)
            grads = tree.cast_like(grads, params)
            after = jax.tree.map(lambda s, a: s * jnp.exp(eta / 2 * a), state.std, for_std)
            return f(params), grads, SnesState(key, after)

        return keys, member, update

    return _rule("snes", net, loss, init, generation, chunk)


@by_recipe
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
        net: any layer.
        loss: any loss that takes its outputs.
        parents: mu, how many children become parents; they live in the state, at first as copies of
            the params.
        children: lambda, mutated copies of parents chosen at random, at least `parents`. No parent
            outlives a generation.
        std: standard deviation of a mutation, the same for every parameter.
        chunk: children at a time; None for all at once.

    Returns:
        A rule whose state is a `GeneticState`. Its value is the best child's loss, the first one's
        among equals. `optax.sgd(1.0)` makes the params the best child, to rounding; evolution goes
        on from the parents in the state, whatever the optimiser makes of the params.

    Raises:
        TypeError, ValueError: an argument is invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = genetic_algorithm(net, fnn.losses.l2_loss, parents=2, children=6)
    >>> rule.init(jax.random.key(1), net.init(jax.random.key(0))).parents[-1].w.shape
    (2, 3, 2)
    """
    _validate.positive("std", std)
    _validate.positive("children", children, whole=True)
    _validate.positive("parents", parents, whole=True)
    if parents > children:
        raise ValueError(
            "`parents` must be at most `children`, of whom they are the best; got "
            f"{parents} of {children}."
        )
    step = float(std)  # a NumPy number would widen the arrays

    def init(key, params):
        copies = jax.tree.map(lambda p: jnp.stack([p] * parents), params)
        return GeneticState(key, copies)

    def generation(params, state):
        key, keys = _split(state.key, children + 1)
        # for every child a key and the index of its parent
        origins = jax.random.randint(keys[0], (children,), 0, parents)
        seeds = keys[1:], origins

        def child(seed):
            key, i = seed
            parent = jax.tree.map(lambda p: p[i], state.parents)
            noise = normal_like(key, parent)
            return tree.add_scale(parent, step, noise)

        def update(f, losses, size):
            order = jnp.argsort(_ranks(losses))  # stable: the first among equals
            first = order[:parents]
            best = jax.tree.map(lambda a: a[first], seeds)
            new = jax.vmap(child)(best)
            winner = jax.tree.map(lambda a: a[0], new)
            grads = tree.sub(params, winner)
            value = losses[first[0]]
            return value, grads, GeneticState(key, new)

        return seeds, child, update

    return _rule("genetic_algorithm", net, loss, init, generation, chunk)


def _rule(name, net, loss, init, generation, chunk, over=lambda f: f):
    """A rule from what its members are, and what their losses change.

    Args:
        name: of the rule.
        net: any layer.
        loss: any loss that takes its outputs.
        init: `(key, params) -> state`.
        generation: `(params, state) -> (seeds, member, update)`: a tree of arrays `[seeds, ...]`;
            `(seed) -> tree like params`, the member or a stack of some; and
            `(f, losses, size) -> (value, grads, state)`, where f is the mean loss of a member, in
            float32 at least, since rounding makes ties.
        chunk: the size: seeds at a time; None for all.
        over: makes the function of a stack from that of a member: `jax.vmap`.
    """
    check_net_and_loss(net, loss)

    def value_and_grad(params, state, x, targets, weights=None):
        def f(member):
            forward = forward_with(net, member)
            _, _, values = forward_pass(forward, loss, x, targets, weights)
            wide = widen(values)
            return weighted_mean(wide, weights)

        seeds, member, update = generation(params, state)
        size = chunk or len(jax.tree.leaves(seeds)[0])
        measure = over(f)
        losses = lax.map(lambda seed: measure(member(seed)), seeds, batch_size=size)
        return update(f, losses, size)

    def members(params, state):
        seeds, member, _ = generation(params, state)
        found = jax.vmap(member)(seeds)
        return jax.tree.map(lambda p, a: a.reshape(-1, *p.shape), params, found)

    return EvolutionRule(name, init, value_and_grad, net.apply, loss, members)


def _split(key, count):
    """The next state's key, and one for every row of E.

    Those are threefry keys: other kinds give other numbers under `vmap` (rbg, as on TPUs), and a
    row is drawn more than once, beside other rows.
    """
    state, key = jax.random.split(key)
    seed = jax.random.bits(key)
    threefry = jax.random.key(seed, impl="threefry2x32")
    return state, jax.random.split(threefry, count)


def _utilities(losses):
    """U of every member; they add up to 0."""
    n = len(losses)
    logs = jnp.log(_ranks(losses))
    u = jnp.maximum(0, math.log(n / 2 + 1) - logs)
    return u / u.sum() - 1 / n


def _ranks(losses):
    """1 for the best ... n; equals share the mean of theirs, and a loss not finite is the worst."""
    finite = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    ranks = rankdata(finite).reshape(losses.shape)
    return ranks.astype(losses.dtype)
