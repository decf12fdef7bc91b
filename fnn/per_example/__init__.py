"""Statistics of the gradients of examples, from the factors of one backward pass.

A *source* is any function `(params, *batch) -> (values [batch], tree of factors)`;
`fnn.source(net, loss)` is one. What is here knows sources and factors, not nets (but for `ntk`). A
source that takes `reduce` is asked to reduce within its pass. `by_vmap` is the other way to the
same numbers: `jax.vmap` of a gradient function over examples, which costs batch x parameters of
memory and serves as the check.
"""

from fnn.per_example.accumulate import accumulate as accumulate
from fnn.per_example.check_source import check_batched as check_batched
from fnn.per_example.check_source import check_source as check_source
from fnn.per_example.clipping import Gradient as Gradient
from fnn.per_example.clipping import Reduction as Reduction
from fnn.per_example.clipping import clipped_gradient as clipped_gradient
from fnn.per_example.clipping import weighted_gradient as weighted_gradient
from fnn.per_example.gram import gram as gram
from fnn.per_example.gram import inner_products as inner_products
from fnn.per_example.gram import ntk as ntk
from fnn.per_example.moments import Moments as Moments
from fnn.per_example.moments import NoiseScale as NoiseScale
from fnn.per_example.moments import SignalToNoise as SignalToNoise
from fnn.per_example.moments import moments as moments
from fnn.per_example.moments import noise_scale as noise_scale
from fnn.per_example.moments import signal_to_noise as signal_to_noise
from fnn.per_example.norms import TopExamples as TopExamples
from fnn.per_example.norms import by_vmap as by_vmap
from fnn.per_example.norms import gradients as gradients
from fnn.per_example.norms import norms as norms
from fnn.per_example.norms import norms_of as norms_of
from fnn.per_example.norms import top_examples as top_examples
from fnn.per_example.report import Report as Report
from fnn.per_example.report import report as report
