"""The computational graph of any function of arrays: values and gradients on every edge, gate by gate."""

from fnn.graph.gates import GATES as GATES
from fnn.graph.gates import Gate as Gate
from fnn.graph.sweeps import Graph as Graph
from fnn.graph.sweeps import trace as trace
from fnn.graph.tracing import Node as Node
from fnn.graph.ways import Derivatives as Derivatives
from fnn.graph.ways import derivatives as derivatives
