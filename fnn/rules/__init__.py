"""Rules that assign credit, one file each. Every one is `rule(net, loss, ...) -> Rule` and drops into `fnn.fit`."""

from fnn.rules.autodiff import autodiff as autodiff
from fnn.rules.backprop import backprop as backprop
from fnn.rules.per_example_sgd import per_example_sgd as per_example_sgd
from fnn.rules.private_sgd import PrivateRule as PrivateRule
from fnn.rules.private_sgd import private_sgd as private_sgd

RULES = (backprop, autodiff, per_example_sgd, private_sgd)
"""Every rule's constructor: the tests, and `experiments train --rule NAME`, run over this tuple."""
