"""The strictest mode for every test.

Strict dtype promotion, rank promotion "raise", warnings as errors (pyproject.toml).

Compilation is what the tests cost. Compiled programs are kept in a temporary folder that all
workers share, and XLA does without the optimisations that take most of its time: a gradient is
right or wrong without them. `default_jit` of cases.py has them, for some nets of every kind;
`XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false pytest` compiles all tests as
users do.
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"fnn-test-cache-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("MPLBACKEND", "Agg")
# NumPy's, which spin while they wait, beside those of XLA
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# Else several devices of one CPU may begin collectives in different orders and wait for each other
# for ever (jaxlib 0.10.2).
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def _flags() -> str:
    """XLA's flags without the optimisations.

    None where this version lacks one of them, at which XLA would end the process.
    """
    flags = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1 "
    )
    flags += IN_ORDER
    probe = [sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(0)"]
    return (
        flags
        if subprocess.run(
            probe, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True
        ).returncode
        == 0
        else ""
    )


if "XLA_FLAGS" not in os.environ:  # workers inherit what the first process found
    os.environ["XLA_FLAGS"] = _flags()
gc.disable()  # JAX makes objects by the million, few of them in cycles; after each file, below

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _processes_keep_programs():
    """The processes that tests start compile the same again and again.

    They keep their programs also where the process of the tests was told not to (CI).
    """
    os.environ.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    gc.collect()
    gc.freeze()  # what is imported stays, and need not be looked at after each file


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of one file are of no use to the next."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users_run():
    """JAX's own dtype promotion inside the test.

    Optax's Adam and schedules do not run under the strict one.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data; the test is skipped where there is none."""
    folder = Path(os.environ.get("FNN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder}; set FNN_DATA")
    return folder
