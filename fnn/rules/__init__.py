"""Rules that assign credit, one file each.

Every one is `rule(net, loss, ...) -> Rule` and drops into `fnn.fit`.
"""

from fnn.rules._blockwise import LocalRule as LocalRule
from fnn.rules.backprop import autodiff as autodiff
from fnn.rules.backprop import backprop as backprop
from fnn.rules.direct_feedback_alignment import (
    direct_feedback_alignment as direct_feedback_alignment,
)
from fnn.rules.evolution import evolution_strategies as evolution_strategies
from fnn.rules.evolution import genetic_algorithm as genetic_algorithm
from fnn.rules.evolution import snes as snes
from fnn.rules.extreme_learning import extreme_learning as extreme_learning
from fnn.rules.feedback_alignment import FEEDBACKS as FEEDBACKS
from fnn.rules.feedback_alignment import Feedback as Feedback
from fnn.rules.feedback_alignment import feedback_alignment as feedback_alignment
from fnn.rules.feedback_alignment import kolen_pollack as kolen_pollack
from fnn.rules.feedback_alignment import random_feedback as random_feedback
from fnn.rules.feedback_alignment import sign_symmetric as sign_symmetric
from fnn.rules.feedback_alignment import weight_mirror as weight_mirror
from fnn.rules.forward_forward import ForwardForward as ForwardForward
from fnn.rules.forward_forward import forward_forward as forward_forward
from fnn.rules.forward_gradient import forward_gradient as forward_gradient
from fnn.rules.hebbian import hebbian as hebbian
from fnn.rules.pepita import pepita as pepita
from fnn.rules.per_example_sgd import per_example_sgd as per_example_sgd
from fnn.rules.perturbation import node_perturbation as node_perturbation
from fnn.rules.perturbation import weight_perturbation as weight_perturbation
from fnn.rules.private_sgd import PrivateRule as PrivateRule
from fnn.rules.private_sgd import PrivateState as PrivateState
from fnn.rules.private_sgd import noise_for as noise_for
from fnn.rules.private_sgd import private_sgd as private_sgd
from fnn.rules.target_propagation import target_propagation as target_propagation

RULES = (
    backprop,
    autodiff,
    per_example_sgd,
    private_sgd,
    feedback_alignment,
    direct_feedback_alignment,
    target_propagation,
    pepita,
    hebbian,
    forward_forward,
    forward_gradient,
    node_perturbation,
    weight_perturbation,
    evolution_strategies,
    snes,
    genetic_algorithm,
    extreme_learning,
)
"""Every rule's constructor: the tests, and `experiments train --rule NAME`, run over this tuple."""
