"""Training: `fit`, `fit_many`, `evaluate`, and the pure functions that they are made of."""

from fnn.training.data import own_batches as own_batches
from fnn.training.data import poisson_batches as poisson_batches
from fnn.training.data import shuffled_batches as shuffled_batches
from fnn.training.epoch import TrainState as TrainState
from fnn.training.epoch import init as init
from fnn.training.epoch import step as step
from fnn.training.fit import NonFiniteError as NonFiniteError
from fnn.training.fit import evaluate as evaluate
from fnn.training.fit import fit as fit
from fnn.training.fit import fit_many as fit_many
from fnn.training.history import History as History
