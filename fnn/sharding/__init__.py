"""Placement on a mesh of devices: where parameters, optimiser state and batches lie.

`jax.jit` of any function then runs there.

A mesh has the axes "data", over which a batch is split, and "model", over which weights are. A plan
is a tree like the params with a `PartitionSpec` for each array: data, to be looked at and edited.

    mesh = make_mesh(model=2)
    plan = tensor_parallel(mesh, params)
    # of a `TrainState` of `fnn.training`: params, the optimiser's state, the rule's state
    where = follow(plan, params, state)
    # without `out_shardings` XLA may move them
    out = (shardings(mesh, where), None)
    step = jax.jit(fnn.training.step(rule, optimizer), out_shardings=out)
    state, value = step(place(mesh, state, where), *place_batch(mesh, (x, targets)))

With several processes every function here is called by all of them alike.
"""

from fnn.sharding.collectives import data_parallel as data_parallel
from fnn.sharding.collectives import gathered as gathered
from fnn.sharding.mesh import make_mesh as make_mesh
from fnn.sharding.placing import place as place
from fnn.sharding.placing import place_batch as place_batch
from fnn.sharding.plans import PLANS as PLANS
from fnn.sharding.plans import follow as follow
from fnn.sharding.plans import fully_sharded as fully_sharded
from fnn.sharding.plans import replicated as replicated
from fnn.sharding.plans import shardings as shardings
from fnn.sharding.plans import tensor_parallel as tensor_parallel
