"""Reading the jaxpr of any function: how `fnn` works on models that it did not write."""
