"""The computational graph of any function of arrays.

Values and gradients on every edge, gate by gate.
"""

from fnn.graph.derivatives import Derivatives as Derivatives
from fnn.graph.derivatives import derivatives as derivatives
from fnn.graph.gates import GATES as GATES
from fnn.graph.gates import Gate as Gate
from fnn.graph.sweep import Graph as Graph
from fnn.graph.sweep import trace as trace
from fnn.graph.trace import Node as Node
