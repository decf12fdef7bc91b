"""The rules of operations that hold a jaxpr: calls, `remat`, `cond` and `scan`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.base import scan
from fnn.tracing.jaxprs import CALLS, open_jaxpr
from fnn.tracing.terms import Chain, Constant, Layers, Patches, Product
from fnn.tracing.walk import (
    RULES,
    TERMS,
    VALUE,
    Rule,
    Scope,
    evaluate,
    fresh_product,
    open_loop,
    plan,
)


def _call(eqn, scope):
    """What a call calls."""
    jaxpr, consts = open_jaxpr(eqn.params[CALLS[eqn.primitive.name]])
    flags = list(map(scope.is_mapped, eqn.invars))
    return Scope(jaxpr, flags, list(map(scope.count_sources, eqn.invars))), consts


def _asks_call(eqn, kinds, scope):
    inner, _ = _call(eqn, scope)
    need = plan(inner, kinds).need
    return [need.get(v) for v in inner.jaxpr.invars]


def _apply_call(eqn, kinds, scope, operands):
    inner, consts = _call(eqn, scope)
    if eqn.params.get("differentiated") and eqn.params["prevent_cse"]:
        # as JAX does, so that XLA computes again what `remat` does not keep
        values = [v for v in operands if isinstance(v, jax.Array)]
        held = iter(lax.optimization_barrier(values))
        operands = [next(held) if isinstance(v, jax.Array) else v for v in operands]
    return evaluate(inner, kinds, consts, operands)


# cond -------------------------------------------------------------------------------------------


def _branches(eqn):
    """The branches; within them every value counts as one that differs between examples."""
    for branch in eqn.params["branches"]:
        jaxpr, consts = open_jaxpr(branch)
        yield Scope(jaxpr, [True] * len(jaxpr.invars)), consts


def _asks_cond(eqn, kinds, scope):
    wanted: set[int] = set()
    for inner, _ in _branches(eqn):
        need = plan(inner, kinds).need
        wanted |= {i for i, v in enumerate(inner.jaxpr.invars) if v in need}
    return [VALUE, *(VALUE if i in wanted else None for i in range(len(eqn.invars) - 1))]


def _apply_cond(eqn, kinds, scope, operands):
    """Every branch returns its own terms, and zeros in the place of those of the others."""
    which, *args = operands

    def run(inner, consts):
        results = evaluate(inner, kinds, consts, args)
        return [_plain(r) if kind == TERMS else r for r, kind in zip(results, kinds, strict=True)]

    branches = list(_branches(eqn))
    shapes = [jax.eval_shape(lambda inner=i, consts=c: run(inner, consts)) for i, c in branches]

    def branch(number):
        own = run(*branches[number])
        found = []
        for j, kind in enumerate(kinds):
            parts = [own[j] if i == number else _zeros(s[j]) for i, s in enumerate(shapes)]
            found.append(parts if kind == TERMS else own[j])
        return found

    functions = [lambda number=i: branch(number) for i in range(len(branches))]
    found = lax.switch(which, functions)
    return [
        list(itertools.chain.from_iterable(result)) if kind == TERMS else result
        for result, kind in zip(found, kinds, strict=True)
    ]


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _plain(terms):
    """Terms whose arrays all differ between examples."""
    found = []
    for term in terms:
        if isinstance(term, (Chain, Constant)):
            term = fresh_product(term.gradient(), "cond")
        found.append(term)
    return found


# scan -------------------------------------------------------------------------------------------


class _Loop:
    """What is wanted of a scan.

    Attributes:
        inner: its body.
        sums: the carries that only add up terms.
        kept: the other carries that somebody wants.
        kinds: wanted of the results of the body.
        need: how the inputs of the body are wanted.
    """

    def __init__(self, eqn, kinds, scope):
        _, self.body_consts = open_jaxpr(eqn.params["jaxpr"])
        self.consts = eqn.params["num_consts"]
        self.carries = eqn.params["num_carry"]
        self.end = self.consts + self.carries
        self.inner = open_loop(eqn, list(map(scope.is_mapped, eqn.invars)))
        self.sums = set()
        self.kept = set()
        for i, kind in enumerate(kinds[: self.carries]):
            if kind == TERMS and self._adds_up(i):
                self.sums.add(i)
            elif kind is not None:
                self.kept.add(i)
        self._settle(kinds[self.carries :])

    def _settle(self, kinds_of_outputs):
        """Adds the carries that the body reads, until no more are wanted."""
        starts = self.inner.jaxpr.invars[self.consts : self.end]
        while True:
            carried = [self._kind(i) for i in range(self.carries)]
            self.kinds = [*carried, *kinds_of_outputs]
            self.need = plan(self.inner, self.kinds).need
            read = {i for i, v in enumerate(starts) if v in self.need}
            more = read - self.kept - self.sums
            if not more:
                return
            self.kept |= more

    def _kind(self, i):
        if i in self.sums:
            return TERMS
        return VALUE if i in self.kept else None

    def _adds_up(self, i):
        """Whether a carry is only added to, once, to make the next."""
        jaxpr = self.inner.jaxpr
        start = jaxpr.invars[self.consts + i]
        used = [v for eqn in jaxpr.eqns for v in eqn.invars] + jaxpr.outvars
        left = [jaxpr.outvars[i]]
        met = 0
        while left:
            atom = left.pop()
            met += atom is start
            eqn = self.inner.made_by(atom, "add_any")
            if eqn is not None:
                left += eqn.invars
        return met == 1 and sum(v is start for v in used) == 1

    def asks(self):
        """How the operands are wanted."""
        asked = [VALUE if v in self.need else None for v in self.inner.jaxpr.invars]
        asked[self.consts : self.end] = [self._kind(i) for i in range(self.carries)]
        return asked

    def run(self, eqn, operands):
        """The carries at the end, the products of every sum, and the other results.

        Products of a sum are stacked. What is no product is added up in the carry; `self.written`
        says where.
        """
        consts = operands[: self.consts]
        self.written = {}

        def body(carry, xs):
            start = [[] if i in self.sums else carry[i] for i in range(self.carries)]
            args = [*consts, *start, *xs]
            found = evaluate(self.inner, self.kinds, self.body_consts, args)
            after = found[: self.carries]
            products = {}
            for i in self.sums:
                products[i], rest = _part(after[i])
                after[i] = carry[i]
                for term in rest:
                    inner = _without_layers(term)
                    plain = isinstance(inner, Product) and not inner.why
                    self.written[i] = self.written.get(i, "") or ("" if plain else "scan")
                    after[i] = after[i] + term.gradient()
            return after, (products, found[self.carries :])

        begin = list(operands[self.consts : self.end])
        for i in self.sums:
            made = eqn.outvars[i].aval
            begin[i] = jnp.zeros(made.shape, made.dtype)
        options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        carry, (products, outputs) = scan(body, begin, operands[self.end :], **options)
        return carry, products, outputs


def _asks_scan(eqn, kinds, scope):
    return _Loop(eqn, kinds, scope).asks()


def _apply_scan(eqn, kinds, scope, operands):
    loop = _Loop(eqn, kinds, scope)
    carry, products, outputs = loop.run(eqn, operands)
    results = list(carry)
    for i in range(loop.carries):
        if i in loop.sums:
            before = operands[loop.consts + i]
            results[i] = [*before, *(term.over_uses() for term in products[i])]
            if i in loop.written:
                results[i].append(fresh_product(carry[i], loop.written[i]))
        elif kinds[i] == TERMS:
            results[i] = [fresh_product(carry[i], scope.reason(eqn.outvars[i]))]
    for kind, found in zip(kinds[loop.carries :], outputs, strict=True):
        results.append([Layers(t, dtype=t.dtype) for t in found] if kind == TERMS else found)
    return results


def _part(terms):
    """Products, and the terms that are none."""
    products = []
    rest = []
    for term in terms:
        inner = _without_layers(term)
        product = isinstance(inner, Patches) or (isinstance(inner, Product) and not inner.is_array)
        (products if product else rest).append(term)
    return products, rest


def _without_layers(term):
    """What every layer of a term is."""
    return _without_layers(term.each) if isinstance(term, Layers) else term


RULES.update(dict.fromkeys(CALLS, Rule(_asks_call, _apply_call)))
RULES["cond"] = Rule(_asks_cond, _apply_cond)
RULES["scan"] = Rule(_asks_scan, _apply_scan)
