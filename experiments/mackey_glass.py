"""How far ahead does a random recurrent net, of which only a linear readout is trained, tell a
chaotic series?

    python -m experiments mackey-glass

The series is the Mackey-Glass equation with delay 17, once per unit of time. A reservoir of 100
units hears it, and ridge regression on 3,000 values finds the readout that tells the next one. Fed
with its own answers, the net runs free from 50 points of a test part. Spectral radius, leak, input
scaling and penalty are chosen on a validation part between the two, with other reservoirs, by the
error after 84 steps. Beside it: a linear model of the last 100 values, found and chosen the same
way, and persistence, x(t + h) = x(t).

Expect root-mean-square errors of 0.0005 one step ahead and of 0.005 ± 0.004 after 84 steps over ten
reservoirs; x has a standard deviation of 0.23. One step ahead says little: there the linear model
errs by 0.0002 only, but after 84 steps by 0.13, and persistence by 0.03 and
0.4. Errors grow about sevenfold in 250 steps, as chaos has it; which reservoir is drawn matters as
much.

In standard deviations, after 84 steps, 100 units err by 0.022 ± 0.016, and 400 units by 0.0006 ±
0.0009, half of them by less than 0.0003 (`--units 400 --spectral-radii 1 --leaks 0.4
--input-scalings 0.2 --penalties 1e-12 1e-11 1e-10`). Jaeger (2001) reports 0.00028 for one net of
400 units, tuned by hand, its output fed back in training too, 2,000 values after the warm-up, a
series by Euler steps; Jaeger and Haas (2004) 10^-4.2 for 1,000 units. Takes about 10 seconds.

Source: lecture 003 (reservoir computing); Mackey, Glass (1977), doi:10.1126/science.267326; Jaeger
(2001), GMD report 148; Jaeger, Haas (2004), doi:10.1126/science.1091277.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fnn
from experiments._run import COLOURS, figure, folder, mean_std, print_table, progress, save_metrics
from fnn import _validate
from fnn.reservoir import Diagnostics, Reservoir, diagnose, echo_state, ridge

MARK = 84  # steps ahead: what settings are chosen by, and what the literature reports


@dataclass(frozen=True)
class Config:
    units: int = 100
    """Of each reservoir; and how many past values the linear model sees."""
    spectral_radii: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """Tried on the validation part, every combination of these four."""
    leaks: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Tried: how fast states move."""
    input_scalings: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Tried: sizes of the input weights, for a series of standard deviation 1."""
    penalties: tuple[float, ...] = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6)
    """Tried: penalties of the ridge regression."""
    tried: int = 4
    """Reservoirs that each combination is tried with."""
    reservoirs: int = 10
    """Others, drawn with the chosen settings, that are measured on the test part."""
    warm_up: int = 200
    """First states that are not trained on."""
    train: int = 3000
    """Length of the train part, the warm-up included."""
    validation: int = 1500
    """Length of the validation part."""
    test: int = 3000
    """Length of the test part."""
    starts: int = 50
    """Points of a part that forecasts start from, evenly spaced."""
    horizon: int = 400
    """Steps that they go ahead; at least 84."""
    seed: int = 0
    """Of the reservoirs."""
    out: Path | None = None
    """Run folder; runs/mackey-glass if not given."""


TINY = Config(
    units=20,
    spectral_radii=(0.9,),
    leaks=(0.3, 1.0),
    input_scalings=(0.3,),
    penalties=(1e-6, 1e-4),
    tried=2,
    reservoirs=2,
    warm_up=50,
    train=400,
    validation=150,
    test=150,
    starts=4,
    horizon=84,
)


class Setting(NamedTuple):
    """What was chosen from, and its error on the validation part."""

    spectral_radius: float
    leak: float
    input_scaling: float
    penalty: float
    error: float  # root mean square 84 steps ahead, geometric mean over reservoirs


class Part(NamedTuple):
    """A stretch of the series, and the free runs in it."""

    first: int
    last: int  # the first value after it
    horizon: int  # steps that a run goes ahead
    runs: int

    @property
    def starts(self) -> np.ndarray:
        """The last value that each run knows, `[runs]`; evenly spaced."""
        return np.linspace(self.first, self.last - 1 - self.horizon, self.runs).astype(int)

    def truth(self, x: np.ndarray) -> np.ndarray:
        """What follows, `[runs, horizon]`."""
        return x[self.starts[:, None] + 1 + np.arange(self.horizon)]


class Model(NamedTuple):
    """Errors on the test part, root mean squares in the units of x; one row per reservoir."""

    one_step: np.ndarray  # [reservoirs], over all of the part
    error: np.ndarray  # [reservoirs, horizon], over the starts of free runs
    forecast: np.ndarray  # [reservoirs, starts, horizon]


class Result(NamedTuple):
    """What was measured."""

    settings: tuple[Setting, ...]  # in order of their error
    reservoir: Model
    linear: Model
    persistence: Model
    truth: np.ndarray  # [starts, horizon]
    deviation: float  # the standard deviation of the test part
    diagnostics: Diagnostics  # of the states of every reservoir, [reservoirs]


def mackey_glass(length: int, *, steps: int = 10, skip: int = 1000) -> np.ndarray:
    """dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x(t), at every unit of time, from x = 1.2 up
    to t = 0.

    Args:
        length: how many values.
        steps: of Runge-Kutta's fourth order per unit. They divide the delay, so that only half
            steps need x between known values: there it is the cubic through two values and their
            slopes.
        skip: first units that are left out.

    Returns:
        `[length]` float64.

    Source: Mackey, Glass (1977), doi:10.1126/science.267326.
    """
    h, lag, x = 1 / steps, 17 * steps, [1.2]
    slopes: list[float] = []

    def slope(now: float, past: float) -> float:
        return 0.2 * past / (1 + past**10) - 0.1 * now

    for i in range((length + skip) * steps):
        left = middle = right = x[0]
        if i >= lag:
            left, right = x[i - lag], x[i - lag + 1]
            middle = (left + right) / 2 + h * (slopes[i - lag] - slopes[i - lag + 1]) / 8
        k1 = slope(x[i], left)
        k2 = slope(x[i] + h / 2 * k1, middle)
        k3 = slope(x[i] + h / 2 * k2, middle)
        k4 = slope(x[i] + h * k3, right)
        slopes.append(k1)
        x.append(x[i] + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return np.array(x[skip * steps :: steps][:length])


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Chooses settings on the validation part, measures on the test part.

    `advance(text)` after each combination tried.
    """
    check(config)
    x = mackey_glass(config.train + config.validation + config.test)
    mean, deviation = x[: config.train].mean(), x[: config.train].std()
    u, middle = (x - mean) / deviation, config.train + config.validation
    validation, test = (
        Part(config.train, middle, MARK, config.starts),
        Part(middle, len(x), config.horizon, config.starts),
    )

    def model(one_step: Any, forecast: Any) -> Model:
        forecast = np.asarray(forecast)
        return Model(
            np.asarray(one_step) * deviation,
            rms(forecast - test.truth(u), 1) * deviation,
            forecast * deviation + mean,
        )

    # states nearly depend on each other, and the readout is found from squares: float32 has too few
    # digits
    with jax.enable_x64(True):
        keys = jax.random.split(fnn.key(config.seed), config.tried + config.reservoirs)
        settings = choose(config, u, validation, keys[: config.tried], advance)
        drawn = draw_reservoirs(config, settings[0], keys[config.tried :])
        one_step, forecast, states = echo_forecasts(
            config, test, u, drawn, np.array([settings[0].penalty])
        )
        _, tried = linear_forecasts(config, validation, u, np.array(config.penalties))
        best = rms(np.asarray(tried) - validation.truth(u), 1)[:, -1].argmin()
        linear = linear_forecasts(config, test, u, np.array(config.penalties)[[best]])
        diagnostics = jax.tree.map(np.asarray, jax.vmap(diagnose)(states))
    still = np.repeat(u[test.starts, None], config.horizon, 1)[None]
    models = (
        model(one_step[:, 0], forecast[:, 0]),
        model(*linear),
        model([rms(np.diff(u[middle:]), 0)], still),
    )
    return Result(settings, *models, test.truth(x), float(x[middle:].std()), diagnostics)


def choose(
    config: Config, u: np.ndarray, part: Part, keys: Any, advance: Callable[[str], Any]
) -> tuple[Setting, ...]:
    """Every setting, in order of the error of its free runs at their end."""
    found, truth = [], part.truth(u)
    for values in itertools.product(config.spectral_radii, config.leaks, config.input_scalings):
        drawn = draw_reservoirs(config, Setting(*values, 0, 0), keys)
        _, forecast, _ = echo_forecasts(config, part, u, drawn, np.array(config.penalties))
        errors = np.exp(np.log(rms(np.asarray(forecast) - truth, 2)[..., -1]).mean(0))
        found += [
            Setting(*values, penalty, float(error))
            for penalty, error in zip(config.penalties, errors, strict=True)
        ]
        advance(
            f"radius {values[0]:g}, leak {values[1]:g}, input {values[2]:g}: {errors.min():.3f}"
        )
    return tuple(sorted(found, key=lambda setting: setting.error))


def draw_reservoirs(config: Config, setting: Setting, keys: Any) -> Reservoir:
    """A reservoir for every key, stacked."""
    settings = {
        "spectral_radius": setting.spectral_radius,
        "leak": setting.leak,
        "input_scaling": setting.input_scaling,
    }
    net = echo_state(1, config.units, **settings)
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *[net.init(key) for key in keys])


@functools.partial(jax.jit, static_argnums=(0, 1))
def echo_forecasts(
    config: Config, part: Part, u: Any, drawn: Reservoir, penalties: Any
) -> tuple[Any, Any, Any]:
    """Of every reservoir with every penalty.

    Error one step ahead, and free runs `[reservoirs, penalties, starts, horizon]`; its states.
    """
    net, u = echo_state(1, config.units), u[:, None]

    def of_reservoir(r: Reservoir) -> tuple[Any, Any, Any]:
        before = net.states(r, u[: config.train], warm_up=config.warm_up)
        after = net.states(r, u[config.train : part.last], before[-1])[part.first - config.train :]

        def with_penalty(penalty: Any) -> tuple[Any, Any]:
            readout = ridge(before[:-1], u[config.warm_up + 1 : config.train], penalty)
            left = after[:-1] @ readout.w + readout.b[None, :] - u[part.first + 1 : part.last]
            forecast = jax.vmap(lambda state: net.forecast(r, readout, state, part.horizon))
            return rms(left[:, 0], 0), forecast(after[part.starts - part.first])[..., 0]

        return *jax.vmap(with_penalty)(penalties), before

    return jax.vmap(of_reservoir)(drawn)


@functools.partial(jax.jit, static_argnums=(0, 1))
def linear_forecasts(config: Config, part: Part, u: Any, penalties: Any) -> tuple[Any, Any]:
    """Of a linear model of the last values with every penalty.

    Error one step ahead, and free runs `[penalties, starts, horizon]`.
    """
    # windows[i] knows u[: i + units]
    windows = u[np.arange(len(u) - config.units)[:, None] + np.arange(config.units)]
    seen = part.first + 1 - config.units

    def with_penalty(penalty: Any) -> tuple[Any, Any]:
        readout = ridge(
            windows[: config.train - config.units], u[config.units : config.train, None], penalty
        )

        def step(window: Any, _: None) -> tuple[Any, Any]:
            y = window @ readout.w + readout.b
            return jnp.append(window[1:], y), y[0]

        left = (
            windows[seen : part.last - config.units] @ readout.w
            + readout.b[None, :]
            - u[part.first + 1 : part.last, None]
        )
        forecast = jax.vmap(lambda window: lax.scan(step, window, None, length=part.horizon)[1])
        return rms(left[:, 0], 0), forecast(windows[part.starts + 1 - config.units])

    return jax.vmap(with_penalty)(penalties)


def rms(a: Any, axis: int) -> Any:
    """The root mean square along an axis."""
    return (a * a).mean(axis) ** 0.5


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    for name in (
        "units",
        "tried",
        "reservoirs",
        "warm_up",
        "train",
        "validation",
        "test",
        "starts",
        "horizon",
    ):
        _validate.positive(name, getattr(config, name), whole=True)
    for name in ("spectral_radii", "leaks", "input_scalings", "penalties"):
        if not getattr(config, name):
            raise ValueError(f"`{name}` is empty: give one at least.")
        for i, value in enumerate(getattr(config, name)):
            _validate.positive(f"{name}[{i}]", value)
    if max(config.leaks) > 1:
        raise ValueError(f"`leaks` must be at most 1, got {max(config.leaks)!r}.")
    if config.horizon < MARK:
        raise ValueError(
            f"`horizon` must be at least {MARK}, got {config.horizon}: errors are compared there."
        )
    for name, least in (
        ("validation", MARK + 2),
        ("test", config.horizon + 2),
        ("train", max(config.warm_up, config.units) + 2),
    ):
        if getattr(config, name) < least:
            raise ValueError(
                f"`{name}` must be at least {least} with these settings, got "
                f"{getattr(config, name)}."
            )


def main(config: Config) -> None:
    combinations = len(config.spectral_radii) * len(config.leaks) * len(config.input_scalings)
    with progress(combinations, "choosing") as advance:
        result = run(config, advance)
    d, rows = result.diagnostics, []
    models = {
        "reservoir": result.reservoir,
        "linear": result.linear,
        "persistence": result.persistence,
    }
    for name, model in models.items():
        at_mark = model.error[:, MARK - 1]
        rows.append(
            (
                name,
                mean_std(list(model.one_step), 5),
                mean_std(list(at_mark)),
                mean_std(list(at_mark / result.deviation)),
            )
        )
    title = (
        f"Root-mean-square errors of x on the test part; {config.reservoirs} reservoirs of "
        f"{config.units} units"
    )
    print_table(
        title, ("model", "1 ahead", f"{MARK} ahead", f"{MARK} ahead, in deviations of x"), rows
    )
    chosen = ", ".join(
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in result.settings[0]._asdict().items()
        if name != "error"
    )
    print(f"of {len(result.settings)} settings the validation part chose {chosen}")
    rank, saturated = mean_std(list(d.effective_rank), 1), 100 * d.saturation.mean()
    print(
        f"states of the reservoirs: rank at least {d.rank.min()}, effective rank {rank}, saturated "
        f"{saturated:.2f} %"
    )
    path = folder("mackey-glass", config.out)
    draw(path / "mackey-glass.png", result, config)
    curves = {name: model._replace(forecast=None) for name, model in models.items()}
    save_metrics(
        path,
        config,
        {"settings": result.settings, **curves, "deviation": result.deviation, "diagnostics": d},
    )
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result, config: Config) -> None:
    """One free run against the truth; and errors against the horizon."""
    at_mark = result.reservoir.error[:, MARK - 1]
    # the reservoir of median error, and the run of median error in it
    chosen = int(np.argsort(at_mark)[len(at_mark) // 2])
    runs = rms(result.reservoir.forecast[chosen] - result.truth, 1)
    start = int(np.argsort(runs)[len(runs) // 2])
    steps, error = np.arange(1, config.horizon + 1), result.reservoir.error.mean(0)
    ahead, linear = result.reservoir.one_step.mean(), result.linear
    title = (
        f"Left to itself for {MARK} units of time a reservoir of {config.units} units errs by "
        f"{error[MARK - 1]:.2g}, a linear model by {linear.error[0, MARK - 1]:.2g}; one unit ahead "
        f"the reservoir by {ahead:.1g}, the linear model by {linear.one_step[0]:.1g}"
    )
    with figure(path, title, columns=2, size=(11.5, 4.6)) as (_, (left, right)):
        left.plot(steps, result.truth[start], color="black", linewidth=3, alpha=0.35, label="truth")
        left.plot(
            steps,
            result.reservoir.forecast[chosen, start],
            color=COLOURS[0],
            label="free run of the reservoir",
        )
        left.plot(
            steps,
            linear.forecast[0, start],
            ":",
            color=COLOURS[1],
            linewidth=1.4,
            label="free run of the linear model",
        )
        left.set(
            xlabel="time since the last value given (units of the equation; delay 17)",
            ylabel="x (dimensionless)",
        )
        left.set(title="run of median error", ylim=(0.35, 1.5))
        left.legend(fontsize=9, ncols=3, loc="upper center", columnspacing=1, handlelength=1.5)
        right.semilogy(steps, result.reservoir.error.T, color=COLOURS[0], linewidth=0.6, alpha=0.4)
        right.semilogy(
            steps,
            error,
            color=COLOURS[0],
            label=f"reservoir (mean; thin: each of {config.reservoirs})",
        )
        right.semilogy(
            steps,
            linear.error[0],
            ":",
            color=COLOURS[1],
            label=f"linear in the last {config.units} values",
        )
        right.semilogy(
            steps, result.persistence.error[0], "--", color=COLOURS[2], label="persistence"
        )
        right.axhline(
            result.deviation,
            color="black",
            linewidth=1,
            linestyle="-.",
            label="standard deviation of x",
        )
        right.set(
            xlabel="horizon (units of time)", ylabel="root-mean-square error of x (dimensionless)"
        )
        right.set_title(f"over {config.starts} runs")
        right.legend(fontsize=9, loc="lower right")
