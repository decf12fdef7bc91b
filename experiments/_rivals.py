"""The same work in other libraries, for the benchmark: training loops, and per-example gradients.

Those that are installed.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnn

Call = Callable[[], Any]


def installed(name: str) -> bool:
    """Whether a package is there."""
    return importlib.util.find_spec(name) is not None


def python_loop(x: np.ndarray, t: np.ndarray, epochs: int, seed: int) -> Call:
    """Plain SGD in a Python loop over a jitted step, 64-32-10 at batch 32."""
    net, rng = fnn.mlp((64, 32, 10)), np.random.default_rng(seed)
    loss = fnn.losses.softmax_cross_entropy_with_integer_labels
    gradient, params = fnn.value_and_grad(net, loss), jax.jit(net.init)(fnn.key(seed))
    step = jax.jit(lambda p, x, t: jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient(p, x, t)[1]))

    def loop() -> Any:
        p = params
        for _ in range(epochs):
            order = rng.permutation(len(x))
            for i in range(0, len(x), 32):
                p = step(p, x[order[i : i + 32]], t[order[i : i + 32]])
        return p

    return loop


def torch_loop(x: np.ndarray, t: np.ndarray, epochs: int) -> Call:
    """The same in PyTorch, eager."""
    import torch

    net = torch_net((64, 32, 10))
    optimizer, loss = torch.optim.SGD(net.parameters(), 0.1), torch.nn.CrossEntropyLoss()
    inputs, labels = torch.from_numpy(x), torch.from_numpy(t.astype(np.int64))

    def loop() -> None:
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(32):
                optimizer.zero_grad()
                loss(net(inputs[rows]), labels[rows]).backward()
                optimizer.step()

    return loop


def sklearn_loop(x: np.ndarray, t: np.ndarray, epochs: int, seed: int) -> Call:
    """The same in scikit-learn."""
    from sklearn.neural_network import MLPClassifier

    def loop() -> None:
        settings: dict[str, Any] = {"batch_size": 32}
        net = MLPClassifier(
            (32,),
            solver="sgd",
            learning_rate_init=0.1,
            momentum=0.0,
            alpha=0.0,
            random_state=seed,
            **settings,
        )
        for _ in range(epochs):
            net.partial_fit(x, t, classes=np.arange(10))

    return loop


def per_example(
    net: fnn.Layer, sizes: tuple[int, ...], params: Any, x: Any, t: Any
) -> dict[str, dict[str, Call]]:
    """Clipped gradients elsewhere, for one batch and max_norm 1.

    Library -> {"plain gradient" and its ways to clipped ones: call}.
    """
    loss = fnn.losses.softmax_cross_entropy_with_integer_labels
    mean = fnn.mean_loss(net, loss)
    found = {"jax.vmap": _jitted({"vmap(grad), clipped": _clipped_by_vmap(mean)}, params, x, t)}
    if installed("jax_privacy"):
        from jax_privacy.clipping import clipped_grad

        sizes_of = [None, *(size for size in (1, 2, 4, 8, 16, 32, 64) if size < len(x))]
        ways = {
            f"clipped_grad, microbatch {size or 'all'}": clipped_grad(
                mean, l2_clip_norm=1.0, batch_argnums=(1, 2), microbatch_size=size
            )
            for size in sizes_of
        }
        found["jax-privacy"] = _jitted({"plain gradient": jax.grad(mean), **ways}, params, x, t)
    if installed("opacus"):
        found["Opacus"] = _opacus(sizes, np.asarray(x), np.asarray(t))
    if installed("backpack") and installed("torch"):
        found["BackPACK"] = _backpack(sizes, np.asarray(x), np.asarray(t))
    return found


def torch_net(sizes: tuple[int, ...]) -> Any:
    """An MLP with ReLU in PyTorch."""
    import torch

    layers: list[Any] = []
    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        layers += (
            [torch.nn.Linear(m, n)]
            if i == len(sizes) - 2
            else [torch.nn.Linear(m, n), torch.nn.ReLU()]
        )
    return torch.nn.Sequential(*layers)


def _clipped_by_vmap(mean: Callable[..., Any]) -> Callable[..., Any]:
    def clipped(params: Any, x: Any, t: Any) -> Any:
        grads = jax.vmap(lambda x, t: jax.grad(mean)(params, x[None], t[None]))(x, t)
        scale = jnp.minimum(1, 1 / fnn.per_example.norms_of(grads)) / len(x)
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), grads)

    return clipped


def _jitted(functions: dict[str, Callable[..., Any]], *args: Any) -> dict[str, Call]:
    return {name: functools.partial(jax.jit(f), *args) for name, f in functions.items()}


def _torch_plain(net: Any, criterion: Any, inputs: Any, labels: Any) -> Call:
    def plain() -> None:
        net.zero_grad()
        criterion(net(inputs), labels).backward()

    return plain


def _opacus(sizes: tuple[int, ...], x: np.ndarray, t: np.ndarray) -> dict[str, Call]:
    import torch
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    inputs, labels = torch.from_numpy(x.copy()), torch.from_numpy(t.astype(np.int64))
    net = GradSampleModuleFastGradientClipping(
        torch_net(sizes), max_grad_norm=1, use_ghost_clipping=True
    )
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=len(x)
    )
    criterion = DPLossFastGradientClipping(net, optimizer, torch.nn.CrossEntropyLoss())

    def ghost() -> None:
        optimizer.zero_grad()
        criterion(net(inputs), labels).backward()

    plain = _torch_plain(torch_net(sizes), torch.nn.CrossEntropyLoss(), inputs, labels)
    return {"plain gradient": plain, "ghost clipping": ghost}


def _backpack(sizes: tuple[int, ...], x: np.ndarray, t: np.ndarray) -> dict[str, Call]:
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad, Variance

    inputs, labels = torch.from_numpy(x.copy()), torch.from_numpy(t.astype(np.int64))
    net, criterion = extend(torch_net(sizes)), extend(torch.nn.CrossEntropyLoss())

    def with_extension(extension: Any) -> Call:
        def call() -> None:
            net.zero_grad()
            with backpack(extension()):
                criterion(net(inputs), labels).backward()

        return call

    plain = _torch_plain(torch_net(sizes), torch.nn.CrossEntropyLoss(), inputs, labels)
    return {
        "plain gradient": plain,
        "norms (BatchL2Grad)": with_extension(BatchL2Grad),
        "variance (Variance)": with_extension(Variance),
    }
