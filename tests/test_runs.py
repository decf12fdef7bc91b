"""Run folders: a run that was stopped goes on as if it had not been, and every epoch of it is
written down once."""

import dataclasses
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import _runs, runs, train
from experiments.__main__ import main
from fnn.checkpoint import steps

ROOT = Path(__file__).parents[1]
CONFIG = dataclasses.replace(
    train.TINY, epochs=4, optimizer="adam", rule="node_perturbation", tensorboard=True
)
pytestmark = pytest.mark.usefixtures("as_users_run")


def results(path):
    return json.loads((path / "metrics.json").read_text())["results"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    train.main(dataclasses.replace(CONFIG, out=path))
    return path


@pytest.mark.parametrize("stop", [(0, 2), (1, 0), (1, 3)])
def test_a_run_that_crashed_goes_on_to_the_same_end(tmp_path, whole, stop, monkeypatch):
    def crash(config, on_epoch, path):
        count = iter(range(100))
        on = lambda epoch, metrics: 1 / 0 if next(count) == stop[0] * 4 + stop[1] else None  # noqa: E731
        return run(config, on, path)

    run = train.run
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", crash)
        with pytest.raises(ZeroDivisionError):
            train.main(dataclasses.replace(CONFIG, out=tmp_path / "run"))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"seed": 0, "ep')  # half a line
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert results(tmp_path / "run") == results(whole)
    lines = _runs.read_metrics(tmp_path / "run")
    assert [(m["seed"], m["epoch"]) for m in lines] == [
        (seed, e) for seed in CONFIG.seeds for e in range(4)
    ]
    assert lines == _runs.read_metrics(whole)


def test_a_run_that_is_done_trains_no_more(whole):
    before = (whole / "metrics.jsonl").read_bytes(), results(whole)
    assert main(["train", "--resume", str(whole)]) == 0
    assert ((whole / "metrics.jsonl").read_bytes(), results(whole)) == before


def test_its_folder_has_flags_lines_checkpoints_and_pictures(whole):
    assert {p.name for p in whole.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "metrics.json",
        "train.png",
    }
    assert _runs.config_of(whole, train.Config) == dataclasses.replace(CONFIG, out=whole)
    for seed in CONFIG.seeds:
        assert len(steps(whole / "checkpoints" / f"seed-{seed}")) >= 1
    best = results(whole)["seeds"][0]
    assert [m["validation_loss"] for m in _runs.read_metrics(whole)][:4] == pytest.approx(
        best["epoch_test_loss"], rel=1e-6
    )


def events(path):
    """Every (tag, epoch, value) of event files.

    Records of length, its checksum, content and its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(path.glob("events.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            yield from (
                (value.tag, event.step, value.simple_value) for value in event.summary.value
            )


def test_tensorboard_shows_what_was_measured(whole):
    for seed in CONFIG.seeds:
        lines = [m for m in _runs.read_metrics(whole) if m["seed"] == seed]
        expected = {
            (name, m["epoch"]): m[name]
            for m in lines
            for name in m
            if name not in ("seed", "epoch")
        }
        found = {
            (tag, step): value
            for tag, step, value in events(whole / "tensorboard" / f"seed-{seed}")
        }
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="8 devices: JAX_NUM_CPU_DEVICES=8")
@pytest.mark.parametrize("plan", train.PLANS)
def test_the_flags_put_a_training_on_devices(plan):
    config = dataclasses.replace(train.TINY, sizes=(8, 8), seeds=(0,))
    (alone,), (spread,) = (
        train.run(c).seeds
        for c in (config, dataclasses.replace(config, devices=8, model=2, plan=plan))
    )
    np.testing.assert_allclose(spread.epoch_test_loss, alone.epoch_test_loss, rtol=1e-5)


def test_new_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main(dataclasses.replace(train.TINY, seeds=(0,), epochs=1))
    assert sorted(p.name for p in Path("runs").iterdir()) == ["train-001", "train-002"]


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments",
        "train",
        "--epochs",
        "100000",
        "--seeds",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            end = time.monotonic() + 90
            while not steps(tmp_path / "run" / "checkpoints" / "seed-0"):
                assert child.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 1
    assert said.splitlines()[-1] == (
        f"Stopped; all is saved in {tmp_path / 'run'}. Go on: python -m experiments train --resume "
        f"{tmp_path / 'run'}"
    )


def test_the_list_says_how_far_runs_are_and_how_to_go_on(tmp_path, whole, capsys):
    (tmp_path / "half").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        lines = (whole / name).read_text().splitlines(keepends=True)
        (tmp_path / "half" / name).write_text(
            "".join(lines if name == "config.json" else lines[:6])
        )
    runs.main(runs.Config(folder=tmp_path, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "6 of 8" in printed
    assert f"half can go on: python -m experiments train --resume {tmp_path / 'half'}" in printed
    (found,) = runs.run(runs.Config(folder=tmp_path))
    values = np.array([m["validation_loss"] for m in _runs.read_metrics(whole)])
    np.testing.assert_allclose(found.loss, (values[:2] + values[4:6]) / 2)
    (done,) = runs.run(runs.Config(folder=whole.parent, names=(whole.name,)))
    assert (done.done, done.of, len(done.loss)) == (8, 8, 4)


def test_what_was_not_finite_is_drawn_as_that(tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"seed": 0, "epoch": 0, "loss": null, "validation_loss": null}\n'
    )
    runs.main(runs.Config(folder=tmp_path, out=tmp_path / "out"))
    assert np.isnan(runs.run(runs.Config(folder=tmp_path))[0].loss).tolist() == [True]


def test_a_damaged_checkpoint_is_one_line(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    home = tmp_path / "run" / "checkpoints" / "seed-0"
    newest = home / f"step-{steps(home)[-1]:012d}"
    (newest / "manifest.json").write_text("{}")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {newest / 'manifest.json'}: its SHA-256 is not the one in SHA256SUMS"
    )
    assert f"or remove {newest} to go on from it." in said


def other_version(path):
    content = json.loads((path / "config.json").read_text())
    del content["config"]["rule"]
    (path / "config.json").write_text(json.dumps(content))


BAD = [
    (
        ["train", "--resume", "nowhere"],
        "`resume` must be a run's folder, got nowhere, which has no config.json",
    ),
    (
        ["train", "--resume", "run", "--epochs", "9"],
        "`resume` takes all other flags from the run's own config.json. Leave them out.",
    ),
    (
        ["train", "--out", "run", "--epochs", "9"],
        "run holds a run already. Go on with it: --resume run.",
    ),
    (
        ["train", "--resume", "other"],
        "other/config.json is of another version of this experiment: rule differ. Begin a new run.",
    ),
    (["train", "--keep", "0"], "`keep` must be a whole number above 0, got 0."),
    (
        ["runs", "--folder", ".", "--names", "rnu"],
        "`names` must be runs in .: other, run; got 'rnu'.",
    ),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_cannot_be_meant_is_said(tmp_path, whole, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((whole / "config.json").read_bytes())
    other_version(tmp_path / "other")
    assert main(flags) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("flags", [["--devices", "99"], ["--data-dir", "/nowhere"]])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, flags):
    more = ["--dataset", "mnist"] if "--data-dir" in flags else []
    assert main(["train", *flags, *more, "--out", str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run").exists()


def test_tensorboard_without_its_package_is_an_error_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "--tensorboard", "--out", str(tmp_path / "run")]) == 1
    assert (
        "The package 'tensorboardX' is missing. Install it: pip install -e '.[tensorboard]'."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
