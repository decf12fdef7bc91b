"""The rules of the house, as far as a program can check them."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fnn

ROOT = Path(__file__).parents[1]
ORDER = [
    "types",
    "_validate",
    "_processes",
    "factors",
    "nets",
    "checkpoint",
    "sharding",
    "interchange",
    "backprop",
    "reservoir",
    "per_example",
    "tracing",
    "graph",
    "verify",
    "rules",
    "alignment",
    "training",
    "__init__",
]
PACKAGES = {
    "checkpoint",
    "factors",
    "nets",
    "per_example",
    "graph",
    "rules",
    "tracing",
    "training",
}
FILES = sorted((ROOT / "fnn").rglob("*.py"))


def imports(file: Path) -> set[str]:
    """The modules of fnn that a file imports while it is imported, by their first name."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fnn":
            names = (
                [node.module.split(".")[1]]
                if "." in node.module
                else [alias.name for alias in node.names]
            )
            found |= {
                name
                for name in names
                if (ROOT / "fnn" / f"{name}.py").exists() or (ROOT / "fnn" / name).is_dir()
            }
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_downward_only(file):
    inside = file.relative_to(ROOT / "fnn").parts[0].removesuffix(".py")
    rank = ORDER.index(inside)
    upward = {
        name
        for name in imports(file)
        if ORDER.index(name) > rank or (ORDER.index(name) == rank and inside not in PACKAGES)
    }
    assert not upward


def test_the_package_only_reexports():
    *nodes, last = ast.parse((ROOT / "fnn" / "__init__.py").read_text()).body[1:]
    assert isinstance(last, ast.FunctionDef)
    assert last.name == "__dir__"
    assert all(
        isinstance(node, ast.ImportFrom) and all(alias.asname == alias.name for alias in node.names)
        for node in nodes
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_public_functions_have_docstrings(file):
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}: {node.name}"


def run(code: str) -> None:
    """Runs a program in a Python of its own, which must succeed."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_importing_fnn_starts_no_backend_and_pulls_in_no_extra():
    run(
        "import sys, fnn; from jax._src import xla_bridge; "
        "assert not xla_bridge._backends, 'a backend was started';"
        "extras = {'sklearn', 'matplotlib', 'sympy', 'tyro', 'rich', 'chex.dataclass', "
        "'pytest', 'pandas', 'torch', 'flax', 'equinox'};"
        "extras &= set(sys.modules);"
        "assert not extras, extras"
    )


def test_the_experiments_extra_has_all_that_they_and_fnn_import():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["experiments"], *extras["tensorboard"]]
    wanted += [
        name for extra in re.findall(r"fnn\[(\w+)\]", " ".join(wanted)) for name in extras[extra]
    ]
    # the last two come with jax
    declared = {re.match(r"[\w-]+", name)[0] for name in wanted} | {"fnn", "numpy", "scipy"}
    optional = "_rivals.py", "_any_models.py"  # other libraries, if there
    files = [*FILES, *(ROOT / "experiments").glob("*.py")]
    files = [file for file in files if file.name not in optional]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {
        alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    modules |= {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
    }
    of = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in modules - set(sys.stdlib_module_names) - {"fnn", "experiments"}
        if not declared & set(of[name])
    }
    assert not missing


def test_annotations_hold_at_run_time():
    run(
        "from jaxtyping import install_import_hook\n"
        "with install_import_hook('fnn', 'beartype.beartype'): import fnn\n"
        "import jax, jax.numpy as jnp, numpy as np, optax\n"
        "block = fnn.residual(fnn.serial(fnn.dense(5, 5), fnn.activations.gelu))\n"
        "net = fnn.serial(fnn.dense(4, 5), fnn.activations.relu, "
        "fnn.repeat(fnn.iterate(block, 2), 3), fnn.dense(5, 3))\n"
        "loss = fnn.losses.softmax_cross_entropy_with_integer_labels\n"
        "params = net.init(jax.random.key(0)); "
        "x, t = np.ones((6, 4), np.float32), np.arange(6) % 3\n"
        "assert fnn.compare_gradients(net, loss, params, x, t).passed\n"
        "source, each = fnn.source(net, loss), fnn.per_example\n"
        "assert each.norms(source)(params, x, t).shape == (6,)\n"
        "def all_of(params, x, t):\n"
        "    clipped = each.clipped_gradient(source, 1.0, per_layer=True)\n"
        "    return {\n"
        "        'clipped': clipped(params, x, t, weights=np.ones(6)),\n"
        "        'noise_scale': each.noise_scale(source)(params, x, t),\n"
        "        'moments': each.moments(source)(params, x, t),\n"
        "        'gram': each.gram(source)(params, x, t),\n"
        "        'inner_products': each.inner_products(source)(params, (x, t), (x, t)),\n"
        "        'of two': each.inner_products(source, source)(params, (x, t), (x, t)),\n"
        "        'ntk': each.ntk(net)(params, x, x[:2]),\n"
        "        'gradients': each.gradients(source)(params, x, t),\n"
        "        'weighted': each.weighted_gradient(source)(params, x, t),\n"
        "        'signal': each.signal_to_noise(source)(params, x, t),\n"
        "        'top': each.top_examples(source, 2)(params, x, t),\n"
        "    }\n"
        "found = jax.jit(all_of)(params, x, t)\n"
        "assert found['clipped'].reduction.examples == 6 and found['noise_scale'].trace > 0\n"
        "assert found['moments'].reduction.kind == 'mean'\n"
        "assert found['gram'].shape == found['inner_products'].shape == (6, 6)\n"
        "assert fnn.check_layer(net, x, key=jax.random.key(0)).passed\n"
        "assert fnn.check_loss(loss, jnp.asarray(x), t, key=jax.random.key(0)).passed\n"
        "rule = fnn.rules.backprop(net, loss)\n"
        "_, history = fnn.fit(rule, optax.adam(0.01), params, (x, t), "
        "epochs=2, batch_size=4, key=jax.random.key(1))\n"
        "assert history.loss.shape == (2,)\n"
    )


def test_every_public_name_of_the_design_is_there():
    names = (
        (
            "mlp serial repeat iterate residual dense layer_norm rms_norm embedding summary "
            "collapse value_and_grad source factors with_manual_vjp"
        ),
        (
            "compare_gradients check_layer check_loss fit fit_many evaluate activations losses "
            "rules per_example graph"
        ),
        "reservoir alignment checkpoint interchange sharding Layer Loss Rule",
    )
    assert [name for line in names for name in line.split() if not hasattr(fnn, name)] == []
