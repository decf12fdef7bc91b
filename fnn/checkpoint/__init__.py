"""Checkpoints: a tree of arrays in a folder, whole or not at all.

No checkpoint loads with one bit wrong.

    folder/step-000000000042/
        arrays.safetensors    the leaves, by number
        manifest.json         format, versions, step, metadata, the structure of the tree;
                              path, kind, shape and dtype of every leaf
        SHA256SUMS            of both, as `sha256sum -c SHA256SUMS` reads it

`save` writes a checkpoint into a folder of another name, flushes it to the disk and renames it.
A crash during a save leaves earlier checkpoints intact; the next `save` or `fit` removes what the
crash left. One process may save into a folder at a time. There is no pickle: nothing in a
checkpoint is ever run. `arrays.safetensors` can be read by any library of that format.

`files` holds the format, `running` what `fit` needs to save in the background and to stop.
"""

from fnn.checkpoint.files import CheckpointError as CheckpointError
from fnn.checkpoint.files import Manifest as Manifest
from fnn.checkpoint.files import manifest as manifest
from fnn.checkpoint.files import restore as restore
from fnn.checkpoint.files import restore_params as restore_params
from fnn.checkpoint.files import save as save
from fnn.checkpoint.files import steps as steps
from fnn.checkpoint.running import Checkpointer as Checkpointer
from fnn.checkpoint.running import Stopped as Stopped
