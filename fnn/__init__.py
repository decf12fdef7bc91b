"""fnn: feed-forward nets in JAX whose backward pass you can see, check and change."""

from fnn import alignment as alignment
from fnn import checkpoint as checkpoint
from fnn import factors as factors
from fnn import graph as graph
from fnn import interchange as interchange
from fnn import per_example as per_example
from fnn import reservoir as reservoir
from fnn import rules as rules
from fnn import sharding as sharding
from fnn import training as training
from fnn.backprop import mean_loss as mean_loss
from fnn.backprop import source as source
from fnn.backprop import value_and_grad as value_and_grad
from fnn.backprop import with_manual_vjp as with_manual_vjp
from fnn.nets import activations as activations
from fnn.nets import losses as losses
from fnn.nets.activations import elementwise as elementwise
from fnn.nets.combinators import iterate as iterate
from fnn.nets.combinators import repeat as repeat
from fnn.nets.combinators import residual as residual
from fnn.nets.combinators import serial as serial
from fnn.nets.convolution import conv as conv
from fnn.nets.convolution import conv_transpose as conv_transpose
from fnn.nets.convolution import flatten as flatten
from fnn.nets.convolution import max_pool as max_pool
from fnn.nets.convolution import mean_pool as mean_pool
from fnn.nets.layers import dense as dense
from fnn.nets.layers import embedding as embedding
from fnn.nets.layers import layer_norm as layer_norm
from fnn.nets.layers import rms_norm as rms_norm
from fnn.nets.models import collapse as collapse
from fnn.nets.models import mlp as mlp
from fnn.nets.models import summary as summary
from fnn.tracing.layer import as_layer as as_layer
from fnn.tracing.source import as_source as as_source
from fnn.training.fit import NonFiniteError as NonFiniteError
from fnn.training.fit import evaluate as evaluate
from fnn.training.fit import fit as fit
from fnn.training.fit import fit_many as fit_many
from fnn.training.history import History as History
from fnn.types import Layer as Layer
from fnn.types import Loss as Loss
from fnn.types import Rule as Rule
from fnn.types import key as key
from fnn.verify import check_layer as check_layer
from fnn.verify import check_loss as check_loss
from fnn.verify import compare_gradients as compare_gradients


def __dir__() -> list[str]:
    """The public names, without the modules that they come from."""
    inside = {"backprop", "nets", "tracing", "verify"}
    return [name for name in globals() if name not in inside and not name.startswith("_")]
