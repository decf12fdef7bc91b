"""Checkpoints: a tree of arrays in a folder, whole or not at all.

No checkpoint loads with one bit wrong.

    folder/step-000000000042/
        arrays.safetensors    the leaves, by number
        manifest.json         format, versions, step, metadata;
                              path, shape, dtype and SHA-256 of every leaf
        SHA256SUMS            of the manifest, as `sha256sum -c SHA256SUMS` reads it

A checkpoint is written into a folder of another name, flushed to the disk, and renamed: who is
killed in between leaves the older ones as they were, and a folder `.unfinished-...` that the next
`save` removes, or `.replaced-...` that it puts back. One process may save into a folder at a time.
No pickle: nothing in a checkpoint is ever run. `arrays.safetensors` can be read by any library of
that format.
"""

from fnn.checkpoint.layout import CheckpointError as CheckpointError
from fnn.checkpoint.layout import Manifest as Manifest
from fnn.checkpoint.reading import manifest as manifest
from fnn.checkpoint.reading import restore as restore
from fnn.checkpoint.reading import steps as steps
from fnn.checkpoint.running import Checkpointer as Checkpointer
from fnn.checkpoint.running import Stopped as Stopped
from fnn.checkpoint.writing import save as save
