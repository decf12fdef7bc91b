"""A gradient as factors: what each example contributes to one parameter, kept until someone asks.

For a weight, the gradient of an example is an outer product `a dz^T` (lecture 001:
dE/dV = dE/dp (x) x). `Outer(a, dz)` keeps the two vectors, so that sums, norms and products of
per-example gradients cost no more than the sum alone. The `backward` of a layer builds each factor
once and passes it to a `Reducer`.
"""

from fnn.factors.base import REDUCERS as REDUCERS
from fnn.factors.base import Factor as Factor
from fnn.factors.base import PerExample as PerExample
from fnn.factors.base import Reducer as Reducer
from fnn.factors.base import factor as factor
from fnn.factors.base import is_factor as is_factor
from fnn.factors.base import keep as keep
from fnn.factors.base import materialise as materialise
from fnn.factors.base import scale_rows as scale_rows
from fnn.factors.base import shares as shares
from fnn.factors.base import square_rows as square_rows
from fnn.factors.base import squared_norm as squared_norm
from fnn.factors.base import total as total
from fnn.factors.base import widen as widen
from fnn.factors.conv import Conv as Conv
from fnn.factors.conv import Window as Window
from fnn.factors.outer import Outer as Outer
from fnn.factors.scatter import Scatter as Scatter
from fnn.factors.stacked import Stacked as Stacked
from fnn.factors.sums import Same as Same
from fnn.factors.sums import Sum as Sum
from fnn.factors.sums import Zero as Zero
from fnn.factors.view import Layout as Layout
from fnn.factors.view import Mapped as Mapped
from fnn.factors.view import View as View
