"""The table in experiments/README.md.

Every concept of the lectures has a row, and what a row names exists and is about its function.
"""

import ast
import re
from functools import cache, reduce
from pathlib import Path

import pytest

import fnn
from experiments.__main__ import discover

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "experiments" / "README.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line[1:-1].split("|")] for line in LINES if line.startswith("|")]
ROWS = [row for row in ROWS if row[0] != "concept" and not row[0].startswith("---")]

# The rows of the sheet of the lectures, without the documents in brackets.
CONCEPTS = [
    # notation
    "samples as columns and as rows",
    "shapes of weights and biases",
    # one neuron, activations
    "one input, one neuron",
    "threshold neuron",
    "sigmoid",
    "logistic regression as odds",
    "3 inputs to 1 neuron, 4 inputs to 3 outputs",
    "tanh",
    "ReLU",
    "leaky ReLU",
    "softplus as a sum of sigmoids",
    "softmax from Bayes",
    "what an activation must be",
    "drawbacks: saturation, not zero-centred, dying",
    # losses and learning
    "regression: half the squared error, RMSE",
    "classification: cross-entropy",
    "binary cross-entropy",
    "maximum likelihood",
    "empirical risk",
    "gradient descent",
    "SGD and memory",
    # backprop, by hand
    "scalar chain",
    "vector form: outer and Hadamard products",
    "last and hidden layer, index form",
    "shallow net",
    "deep net",
    # derivatives of any function
    "four ways to differentiate",
    "the example of 000",
    "the example of 003",
    "the examples of 002",
    "chain rule, total derivative",
    "general gate",
    "gates: add, copy, mul, max",
    # networks
    "dense layer, latent representation, MLP",
    "linear collapse",
    "vanishing gradients",
    "shallow and deep",
    "zero initialisation",
    "random initialisation",
    "3, 6, 20 hidden neurons",
    "planar data, not linearly separable",
    "approximating unknown functions",
    "physical and tabular properties",
    "image recognition",
    "generating names and spells",
    "training loop",
]
# Those of the section "Alternatives to backprop" and its experiments, from when it is there.
SECTION = any(line.startswith("## Alternatives to backprop") for line in LINES)
ALTERNATIVES = [
    "evolutionary algorithms",
    "reservoir computing",
    "direct feedback alignment",
    "forward-forward",
]
ON_ALTERNATIVES = {
    "alignment-angles",
    "credit-assignment",
    "evolution",
    "forward-gradient-variance",
    "mackey-glass",
}
# Experiments on other things than the lectures teach.
OTHERS = {
    "any-model",
    "benchmark",
    "endurance",
    "feedback-on-convolutions",
    "gallery",
    "influence",
    "private-training",
    "privacy-audit",
    "runs",
}


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


@cache
def functions_in(file):
    """The text of every function of a file, decorators included, by name."""
    lines, functions = (ROOT / file).read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef):
            start = min(part.lineno for part in (node, *node.decorator_list))
            functions[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
    return functions


def text_of(file, test):
    """A test and what it calls in its file."""
    functions, found, waiting = functions_in(file), {}, [test]
    while waiting:
        name = waiting.pop()
        found[name] = functions[name]
        waiting += [
            word
            for word in set(re.findall(r"\w+", found[name])) & set(functions)
            if word not in found
        ]
    return "\n".join(found.values())


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_row_names_exists_and_uses_its_function(row):
    _, functions, tests, experiments = row
    texts = [
        (ROOT / "experiments" / f"{name.replace('-', '_')}.py").read_text()
        for name in named(experiments)
    ]
    assert named(tests)
    for name in named(tests):
        file, _, test = (
            name.partition("::") if "/" in name else ("tests/test_lectures.py", "", name)
        )
        assert test in functions_in(file), (
            f"{name} is no test: `file::test`, or the name of one in tests/test_lectures.py"
        )
        texts.append(text_of(file, test))
    assert named(functions)
    for name in named(functions):
        reduce(getattr, name.split(".")[1:], fnn)
        assert any(re.search(rf"\b{name.split('.')[-1]}\b", text) for text in texts), (
            f"neither test nor experiment uses {name}"
        )


def test_the_table_has_every_concept_once():
    concepts = [re.sub(r" \(00.*\)$", "", row[0]) for row in ROWS]
    assert [concept for concept in CONCEPTS if concept not in concepts] == []
    assert [
        start
        for start in ALTERNATIVES
        if SECTION and not any(concept.startswith(start) for concept in concepts)
    ] == []
    assert len(set(concepts)) == len(concepts)


def test_every_experiment_on_the_lectures_has_a_row():
    shown = {name for row in ROWS for name in named(row[3])}
    assert shown <= set(discover())
    assert set(discover()) - OTHERS - (set() if SECTION else ON_ALTERNATIVES) <= shown
