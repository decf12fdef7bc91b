"""Every experiment runs with its tiny config, and the command line explains what is wrong."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fnn
from experiments import _run, gallery, train
from experiments.__main__ import discover, main

NAMES = tuple(discover())
TINY = train.TINY
PROPERTIES = (
    "color",
    "linestyle",
    "marker",
    "fillstyle",
    "facecolor",
    "edgecolor",
    "hatch",
    "alpha",
    "linewidth",
)


def looks(axes: Axes) -> list[tuple[str, ...]]:
    """How the legend of a panel shows each of its series: colours, lines and markers."""
    legend = axes.get_legend()
    handles = [] if legend is None else legend.legend_handles
    return [
        tuple(str(getattr(handle, f"get_{name}", str)()) for name in PROPERTIES)
        for handle in handles
    ]


def module_of(name: str):
    return importlib.import_module(f"experiments.{name.replace('-', '_')}")


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_keeps_the_convention(name):
    module = module_of(name)
    assert f"python -m experiments {name}" in module.__doc__
    assert module.TINY.__dataclass_params__.frozen
    assert module.TINY.out is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("as_users_run")
def test_every_experiment_runs_tiny_and_saves_metrics_and_a_picture(
    name, tmp_path, monkeypatch, capsys
):
    module, folder = module_of(name), tmp_path / "new" / "folder"
    run, save = module.run, Figure.savefig

    def silent_run(*args, **kwargs):
        capsys.readouterr()
        result = run(*args, **kwargs)
        assert capsys.readouterr().out == "", "run prints nothing"
        written = {
            path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()
        }
        assert written <= (
            {"config.json", "metrics.jsonl", "checkpoints"} if name == "train" else set()
        ), "run writes nothing"
        return result

    def checked_save(figure, *args, **kwargs):
        for axes in figure.findobj(Axes):
            alike = [label for label, count in Counter(looks(axes)).items() if count > 1]
            assert not alike, "series of one legend look alike"
        save(figure, *args, **kwargs)

    monkeypatch.setattr(module, "run", silent_run)
    monkeypatch.setattr(Figure, "savefig", checked_save)
    module.main(dataclasses.replace(module.TINY, out=folder))
    metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert set(metrics) == {"config", "results", "versions"}
    assert metrics["versions"]["jax"] == jax.__version__
    assert {path.suffix for path in folder.iterdir()} >= {".json", ".png"}
    assert capsys.readouterr().out


def test_the_list_names_every_experiment_without_importing_it(tmp_path, capsys):
    (tmp_path / "my_question.py").write_text(
        '"""What is it?\n\nMore."""\nraise RuntimeError("imported")\n'
    )
    (tmp_path / "_helper.py").write_text("")
    assert discover(tmp_path) == {"my-question": "What is it?"}
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}  " in printed for name in NAMES)
    assert all(discover().values())


def test_an_unknown_experiment_exits_with_2_and_the_nearest_name(capsys):
    assert main(["trian"]) == 2
    assert "error: Unknown experiment 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_an_error_of_ours_is_one_line(capsys, tmp_path):
    assert main(["train", "--epochs", "0", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: `epochs` must be a whole number above 0, got 0.\n"
    assert not (tmp_path / "out").exists()


def test_an_error_that_is_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "main", lambda config: np.zeros(2).reshape(3))
    with pytest.raises(ValueError, match="cannot reshape"):
        main(["train"])


def test_a_slip_in_a_file_of_ours_is_a_bug_too(monkeypatch):
    monkeypatch.setattr(train, "main", lambda config: _run.mean_std(["a", "b"]))
    with pytest.raises((TypeError, ValueError)):
        main(["train"])
    monkeypatch.setattr(
        train,
        "main",
        lambda config: train.make_optimizer(dataclasses.replace(TINY, batch_size=0), 100),
    )
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--out", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train"]) == 1
    assert (
        "'tyro' is missing. Install it: pip install -e '.[experiments]'" in capsys.readouterr().err
    )


def test_a_flag_of_the_wrong_type_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs", "many"])
    assert stop.value.code == 2


def test_the_command_line_trains(tmp_path, capsys):
    flags = (
        "train --dataset moons --sizes 8 --optimizer momentum --learning-rate 0.05 --epochs 1 "
        "--batch-size 100 --seeds 3 4 --out"
    )
    assert main([*flags.split(), str(tmp_path)]) == 0
    assert "mean ± std" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["seeds"] == [3, 4]
    assert [len(seed["epoch_loss"]) for seed in metrics["results"]["seeds"]] == [1, 1]


# test_train.py trains by every rule
SOME = ("backprop", "private_sgd", "direct_feedback_alignment")


@pytest.mark.parametrize(
    ("rule", "dataset"), [(rule, dataset) for rule in SOME for dataset in ("moons", "diabetes")]
)
def test_rules_train(rule, dataset):
    config = dataclasses.replace(
        TINY, rule=rule, dataset=dataset, learning_rate=0.05, epochs=3, seeds=(0,)
    )
    (seed,) = train.run(config).seeds
    assert seed.epoch_loss.shape == seed.epoch_test_loss.shape == (3,)
    assert np.isfinite([seed.train_loss, seed.test_loss]).all()
    assert (
        (seed.test_accuracy is None)
        == (seed.epoch_test_accuracy is None)
        == (dataset == "diabetes")
    )
    if rule in ("backprop", "autodiff", "per_example_sgd"):
        assert seed.epoch_loss[-1] < seed.epoch_loss[0]


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
@pytest.mark.usefixtures("as_users_run")
def test_every_optimizer_trains_with_schedule_and_clipping(optimizer):
    config = dataclasses.replace(
        TINY,
        optimizer=optimizer,
        learning_rate=0.01,
        schedule="cosine",
        clip_norm=1.0,
        seeds=(0,),
        epochs=1,
    )
    assert np.isfinite(train.run(config).seeds[0].test_loss)


@pytest.mark.parametrize("dtype", train.DTYPES)
@pytest.mark.parametrize("dataset", ["moons", "diabetes"])
def test_every_dtype_trains(dtype, dataset):
    (seed,) = train.run(
        dataclasses.replace(TINY, dtype=dtype, dataset=dataset, learning_rate=0.01, seeds=(0,))
    ).seeds
    assert np.isfinite(seed.test_loss)
    assert not jax.config.jax_enable_x64


def test_a_seed_gives_the_same_net_alone_and_among_others():
    both, alone = train.run(TINY), train.run(dataclasses.replace(TINY, seeds=(1,)))
    assert both.parameters == alone.parameters == 2 * 8 + 8 + 8 * 2 + 2
    np.testing.assert_array_equal(both.seeds[1].epoch_loss, alone.seeds[0].epoch_loss)
    assert not np.array_equal(both.seeds[0].epoch_loss, both.seeds[1].epoch_loss)


def test_the_test_curve_ends_in_the_final_number():
    (seed,) = train.run(dataclasses.replace(TINY, seeds=(0,))).seeds
    assert seed.test_accuracy is not None
    assert seed.epoch_test_accuracy is not None
    np.testing.assert_allclose(seed.test_loss, seed.epoch_test_loss[-1], rtol=1e-6)
    np.testing.assert_allclose(seed.test_accuracy, seed.epoch_test_accuracy[-1], rtol=1e-6)


def test_divergence_is_an_error_that_says_how_to_mend_it(capsys, tmp_path):
    flags = (
        "train --dataset diabetes --optimizer sgd --learning-rate 1e30 --epochs 2 --seeds 0 --out"
    )
    assert main([*flags.split(), str(tmp_path)]) == 1
    assert "A lower learning rate" in capsys.readouterr().err


def test_no_hidden_layer_is_a_linear_net():
    assert train.run(dataclasses.replace(TINY, sizes=(), seeds=(0,))).parameters == 2 * 2 + 2


def test_a_table_shows_what_it_is_given(capsys):
    _run.print_table("leaves", ("leaf", "needs"), [("[0][bold].w", 'pip install "fnn[privacy]"')])
    assert '[0][bold].w │ pip install "fnn[privacy]"' in capsys.readouterr().out


def test_metrics_are_strict_json(tmp_path):
    results = {
        "loss": [1.0, float("nan"), np.float32("inf")],
        "net": fnn.History(jax.numpy.ones(2), np.arange(2), {}),
        3: np.int64(4),
    }
    file = _run.save_metrics(tmp_path, TINY, results)
    found = json.loads(file.read_text(), parse_constant=pytest.fail)["results"]
    assert found == {
        "loss": [1.0, None, None],
        "net": {"loss": [1.0, 1.0], "step_loss": [0, 1], "validation": {}, "records": []},
        "3": 4,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_page_shows_every_experiment_asked_for_and_needs_no_network(tmp_path):
    names = ("computation-graph", "wide-net-saturation")
    assert main(["gallery", "--names", *names, "--tiny", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "http" not in page
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    for name in names:
        assert {f"#{name}", f"{name}/{name}.png", f"{name}/metrics.json"} <= set(links)
    assert "gallery.png" in links
    for link in links:
        assert (
            f'id="{link[1:]}"' in page if link.startswith("#") else (tmp_path / link).is_file()
        ), link
    assert "∂x₁ = ∂z₂ · cos(x₁)" in page  # what it printed
    assert "<code>python -m experiments computation-graph --sizes 2 1 --batch 1</code>" in page
    assert set(gallery.run(gallery.Config())) == set(NAMES) - {"benchmark", "gallery", "runs"}


def test_the_page_says_with_which_settings_a_picture_is_drawn():
    config = gallery.Config()
    assert gallery.command("train", config) == "python -m experiments train"
    assert (
        gallery.command("private-training", config)
        == "python -m experiments private-training --datasets digits"
    )


def test_a_run_that_fails_shows_nothing_of_an_earlier_one(tmp_path, monkeypatch):
    for name in ("train.png", "metrics.json", "notes.md"):
        (tmp_path / name).write_text("stale")
    monkeypatch.setattr(train, "main", lambda config: 1 / 0)
    error = gallery.one("train", tmp_path, gallery.Config())
    shown = gallery.collect("train", "What?", tmp_path, gallery.Config(), 1.0, error)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.md", "output.txt"]
    assert (shown.pictures, shown.metrics) == ((), False)
    page = gallery.page([shown])
    assert "ZeroDivisionError" in page
    assert "metrics.json" not in page


def test_a_process_that_is_killed_is_an_error_on_the_page():
    seconds, error = gallery.apart(os._exit, 9)
    assert "killed" in error
    assert seconds > 0


def test_the_page_says_which_experiment_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "discover", lambda: {"no-such-thing": "What is it?"})
    assert main(["gallery", "--names", "no-such-thing", "--out", str(tmp_path)]) == 1
    assert "1 of 1 experiments ended with an error: no-such-thing" in capsys.readouterr().err
    assert "ModuleNotFoundError" in (tmp_path / "index.html").read_text()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"Unknown experiment 'digit'. Did you mean 'digits'"):
        gallery.run(gallery.Config(names=("digit",)))
