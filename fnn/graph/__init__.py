"""The computational graph of any function of arrays, with a value and a gradient on every edge."""

from fnn.graph.derivatives import Derivatives as Derivatives
from fnn.graph.derivatives import derivatives as derivatives
from fnn.graph.gates import GATES as GATES
from fnn.graph.gates import Gate as Gate
from fnn.graph.sweep import Graph as Graph
from fnn.graph.sweep import Node as Node
from fnn.graph.trace import trace as trace
