"""What is wrong with a flag is one line that names it, before a folder is made or anything
computed."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import optax
import pytest

import fnn
from experiments import (
    _plane,
    activations,
    any_model,
    dead_relu,
    decision_boundary,
    digits,
    feedback_on_convolutions,
    function_approximation,
    gallery,
    gradient_descent,
    linear_collapse,
    logistic_regression,
    names,
    planar_classification,
    privacy_audit,
    private_training,
    softmax_from_bayes,
    tabular_regression,
    train,
    vanishing_gradients,
    wide_net_saturation,
    zero_initialisation,
)

pytestmark = pytest.mark.usefixtures("as_users_run")

WHOLE, POSITIVE = "must be a whole number above 0", "must be a finite number above 0"
BAD_FLAGS = [
    (activations, {"limit": 0.0}, f"`limit` {POSITIVE}, got 0.0"),
    (activations, {"points": 0}, f"`points` {WHOLE}, got 0"),
    (any_model, {"models": ("Flax CN",)}, "Unknown model 'Flax CN'. Did you mean 'Flax CNN'"),
    (any_model, {"channels": (8, 0)}, f"`channels[1]` {WHOLE}, got 0"),
    (any_model, {"dataset": "moons"}, "Unknown dataset 'moons'"),
    (dead_relu, {"activations": ("rleu",)}, "Unknown activation 'rleu'. Did you mean 'relu'"),
    (dead_relu, {"watched": 0.5}, "`watched` must be one of the rates (0.1, 4.0), got 0.5"),
    (dead_relu, {"biases": (0.0,)}, "`biases[0]` must be a finite number other than 0"),
    (dead_relu, {"rates": (4.0, 4.0)}, "`rates` has repeats"),
    (dead_relu, {"seed": -1}, "`seed` must be in"),
    (decision_boundary, {"dataset": "spiral"}, "Unknown dataset 'spiral'. Did you mean 'spirals'"),
    (
        decision_boundary,
        {"widths": ()},
        "`widths` must be one to six whole numbers above 0, got ()",
    ),
    (decision_boundary, {"widths": (3, 0)}, f"`widths[1]` {WHOLE}, got 0"),
    (decision_boundary, {"activation": "tahn"}, "Did you mean 'tanh'"),
    (
        decision_boundary,
        {"pixels": 1},
        "`pixels` must be at least 2, since boundaries are drawn, got 1",
    ),
    (digits, {"dataset": "minst"}, "Unknown dataset 'minst'. Did you mean 'mnist'"),
    (digits, {"epochs": 0}, f"`epochs` {WHOLE}, got 0"),
    (
        feedback_on_convolutions,
        {"methods": ("feedback alignment",)},
        "`methods` must have backprop, which the others are held against",
    ),
    (feedback_on_convolutions, {"channels": (2, 2, 2, 2)}, "`channels` has 4 entries, but"),
    (feedback_on_convolutions, {"rates": (0.0,)}, f"`rates[0]` {POSITIVE}, got 0.0"),
    (function_approximation, {"widths": ()}, "`widths` is empty"),
    (function_approximation, {"noise": 0.0}, f"`noise` {POSITIVE}, got 0.0"),
    (
        function_approximation,
        {"batch_size": 500},
        "`batch_size` is 500 but `data` has only 200 examples",
    ),
    (function_approximation, {"seed": -1}, "`seed` must be in 0 ... 2**32 - 1, got -1"),
    (
        function_approximation,
        {"learning_rate": 1e30},
        "Nets of 1 units diverge. Choose a lower `learning_rate`",
    ),
    (gallery, {"jobs": 0}, f"`jobs` {WHOLE}, got 0"),
    (gallery, {"names": ("digit",)}, "Unknown experiment 'digit'. Did you mean 'digits'"),
    (gradient_descent, {"fractions": ()}, "`fractions` is empty"),
    (gradient_descent, {"curvatures": (1.0, -1.0)}, f"`curvatures[1]` {POSITIVE}, got -1.0"),
    (
        gradient_descent,
        {"batch_sizes": (354,)},
        "`batch_size` is 354 but `data` has only 353 examples",
    ),
    (linear_collapse, {"dataset": "digits"}, "Unknown dataset 'digits'"),
    (linear_collapse, {"activation": "rleu"}, "Did you mean 'relu'"),
    (linear_collapse, {"depth": 0}, f"`depth` {WHOLE}, got 0"),
    (linear_collapse, {"depths": ()}, "`depths` is empty"),
    (
        logistic_regression,
        {"features": ("mean radios",)},
        "Unknown feature 'mean radios'. Did you mean 'mean radius'",
    ),
    (logistic_regression, {"features": ()}, "`features` must name at least one feature"),
    (logistic_regression, {"steps": 3}, "`steps` must be at least 10, got 3"),
    (logistic_regression, {"bins": 1000}, "`bins` is 1000 but there are only 569 tumours"),
    (logistic_regression, {"learning_rate": 1e300}, "diverges at `learning_rate` 1e+300"),
    (names, {"seed": 2**32}, "`seed` must be in"),
    (names, {"census": "frist"}, "Did you mean 'first'"),
    (names, {"embedding": 1}, "`embedding` must be at least 2"),
    (names, {"embedding_scale": 0.0}, f"`embedding_scale` {POSITIVE}"),
    (planar_classification, {"hidden": 0}, f"`hidden` {WHOLE}, got 0"),
    (planar_classification, {"learning_rate": -1.0}, f"`learning_rate` {POSITIVE}, got -1.0"),
    (planar_classification, {"pixels": 1}, "`pixels` must be at least 2"),
    (privacy_audit, {"draws": 0}, f"`draws` {WHOLE}, got 0"),
    (privacy_audit, {"batches": 0}, f"`batches` {WHOLE}, got 0"),
    (privacy_audit, {"batch_size": -1}, f"`batch_size` {WHOLE}, got -1"),
    (privacy_audit, {"noise_multiplier": 0.0}, f"`noise_multiplier` {POSITIVE}, got 0.0"),
    (privacy_audit, {"sizes": (-4,)}, f"`sizes[0]` {WHOLE}, got -4"),
    (private_training, {"epochs": 0}, f"`epochs` {WHOLE}, got 0"),
    (private_training, {"sizes": (-4,)}, f"`sizes[0]` {WHOLE}, got -4"),
    (
        private_training,
        {"noise_multipliers": (0.0,)},
        f"`noise_multipliers[0]` {POSITIVE}, got 0.0",
    ),
    (private_training, {"learning_rate": -1.0}, f"`learning_rate` {POSITIVE}, got -1.0"),
    (private_training, {"delta": 1.5}, "`delta` is a probability, so below 1, got 1.5"),
    (private_training, {"seeds": (1, 1)}, "`seeds` has repeats"),
    (
        private_training,
        {"datasets": ("digits", "digits")},
        "`datasets` must be one at least and each once",
    ),
    (private_training, {"datasets": ("diabetes",)}, "diabetes has no classes"),
    (
        softmax_from_bayes,
        {"priors": (0.5, 0.3, 0.3)},
        "`priors` must be three numbers with the sum 1, got (0.5, 0.3, 0.3)",
    ),
    (softmax_from_bayes, {"priors": (0.5, 0.5, 0.0)}, f"`priors[2]` {POSITIVE}"),
    (
        softmax_from_bayes,
        {"grid": 1},
        "`grid` must be at least 2, since boundaries are drawn, got 1",
    ),
    (tabular_regression, {"sizes": ()}, "`sizes` is empty"),
    (tabular_regression, {"splits": 0}, f"`splits` {WHOLE}, got 0"),
    (train, {"dataset": "digit"}, "Unknown dataset 'digit'. Did you mean 'digits'"),
    (train, {"rule": "backprob"}, "Unknown rule 'backprob'. Did you mean 'backprop'"),
    (train, {"optimizer": "adma"}, "Unknown optimizer 'adma'. Did you mean 'adam'"),
    (train, {"activation": "rleu"}, "Unknown activation 'rleu'. Did you mean 'relu'"),
    (train, {"schedule": "cosin"}, "Did you mean 'cosine'"),
    (train, {"dtype": "float23"}, "Did you mean 'float32'"),
    (train, {"learning_rate": 0.0}, f"`learning_rate` {POSITIVE}, got 0.0"),
    (train, {"learning_rate": float("nan")}, f"`learning_rate` {POSITIVE}, got nan"),
    (train, {"learning_rate": float("inf")}, "`learning_rate`"),
    (train, {"clip_norm": -1.0}, f"`clip_norm` {POSITIVE}"),
    (train, {"epochs": 0}, f"`epochs` {WHOLE}, got 0"),
    (train, {"batch_size": -4}, f"`batch_size` {WHOLE}, got -4"),
    (train, {"batch_size": 801}, "`batch_size` is 801 but `data` has only 800 examples"),
    (train, {"sizes": (8, 0)}, f"`sizes[1]` {WHOLE}, got 0"),
    (train, {"seeds": ()}, "`seeds` is empty"),
    (train, {"seeds": (1, 1)}, "`seeds` has repeats"),
    (train, {"seeds": (-1,)}, "`seed` must be in 0 ... 2**32 - 1, got -1"),
    (train, {"data_seed": 2**32}, "`seed` must be in"),
    (
        vanishing_gradients,
        {"depths": (8, 4)},
        "`depths` must be rising whole numbers from 2 on, got (8, 4)",
    ),
    (vanishing_gradients, {"depths": (1, 4)}, "`depths` must be rising"),
    (vanishing_gradients, {"examples": 0}, f"`examples` {WHOLE}, got 0"),
    (wide_net_saturation, {"widths": (0,)}, f"`widths[0]` {WHOLE}, got 0"),
    (wide_net_saturation, {"widths": ()}, "`widths` is empty"),
    (zero_initialisation, {"width": 1}, "`width` must be at least 2"),
    (zero_initialisation, {"learning_rate": -1.0}, f"`learning_rate` {POSITIVE}"),
    (
        zero_initialisation,
        {"learning_rate": 1e38},
        "diverges from zero weights. Choose a lower `learning_rate`",
    ),
    (zero_initialisation, {"seed": -1}, "`seed` must be in"),
]
FIRST = {module: flags for module, flags, _ in reversed(BAD_FLAGS)}


def name(module):
    return module.__name__.removeprefix("experiments.")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    BAD_FLAGS,
    ids=[f"{name(m)} {flags}" for m, flags, _ in BAD_FLAGS],
)
def test_a_bad_flag_is_an_error_that_names_it(module, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module.run(dataclasses.replace(module.TINY, **flags))


@pytest.mark.parametrize("module", FIRST, ids=name)
def test_a_bad_flag_leaves_no_folder(module, tmp_path):
    with pytest.raises(ValueError, match=r"`|Unknown"):
        module.main(dataclasses.replace(module.TINY, **FIRST[module], out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", FIRST, ids=name)
def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_computed(
    module, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    if module is not gallery:  # whose `run` only lists the experiments
        monkeypatch.setattr(module, "run", lambda *args: pytest.fail("it ran"))
    with pytest.raises(OSError, match="file"):
        module.main(dataclasses.replace(module.TINY, out=tmp_path / "file" / "run"))


def test_nets_in_the_plane_that_diverge_are_an_error():
    net, part = fnn.dense(2, 1), (np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))
    rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    with pytest.raises(ValueError, match=r"3 of 3 nets diverge. Choose a lower `learning_rate`"):
        _plane.train_starts(
            rule, optax.sgd(1e30), net, part, part, epochs=3, batch_size=4, starts=3, seed=0
        )


def test_names_with_an_unreadable_file_are_an_error_that_says_so(tmp_path):
    (tmp_path / "numbers.txt").write_text("1\n2\n3\n")
    with pytest.raises(ValueError, match=r"`file` must hold at least 10 distinct names .* has 0"):
        names.run(names.Config(file=tmp_path / "numbers.txt"))
