"""A gradient as factors.

What each example contributes to one parameter, kept apart until someone asks.

For a weight, an example's gradient is an outer product `a dz^T` (lecture 001: dE/dV = dE/dp (x) x).
`Outer(a, dz)` keeps the two vectors, so that sums, norms and products of per-example gradients cost
no more than the sum alone. A layer's `backward` builds each factor once and hands it to a
`Reducer`.

Arrays are `[batch, ..., features]`: axes between the first and the last are positions, which an
example sums over. An array without a batch axis, `[features]`, is a batch of one.
"""

from fnn.factors.base import Factor as Factor
from fnn.factors.base import Method as Method
from fnn.factors.base import PerExample as PerExample
from fnn.factors.base import Stacked as Stacked
from fnn.factors.base import factor as factor
from fnn.factors.base import is_factor as is_factor
from fnn.factors.outer import Outer as Outer
from fnn.factors.reducers import REDUCERS as REDUCERS
from fnn.factors.reducers import Reducer as Reducer
from fnn.factors.reducers import keep as keep
from fnn.factors.reducers import materialise as materialise
from fnn.factors.reducers import norm as norm
from fnn.factors.reducers import quick_square as quick_square
from fnn.factors.reducers import second_moment as second_moment
from fnn.factors.reducers import squared_norm as squared_norm
from fnn.factors.reducers import total as total
from fnn.factors.scatter import Scatter as Scatter
from fnn.factors.shapes import sum_positions as sum_positions
