"""Two real processes train as one does.

Where one dies the other ends, and the run goes on from its checkpoint.
"""

import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import time

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import fnn
from experiments import _processes, _runs
from experiments.__main__ import main
from fnn import checkpoint

FLAGS = [
    "--sizes",
    "16",
    "--seeds",
    "0",
    "--batch-size",
    "128",
    "--optimizer",
    "sgd",
    "--learning-rate",
    "0.1",
    "--keep",
    "100",
]


def context():
    """Processes forked from one that has imported all and started nothing."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["experiments.train", "test_distributed"])
    return found


def work(flags, variables, devices, log):
    """What a process does: the command line, with the variables that name it."""
    os.environ.update(variables)
    jax.config.update("jax_num_cpu_devices", devices)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(["train", *flags]))


class Processes:
    """As many as there are ranks; all are killed at the end of a `with`, whatever happens in it."""

    def __init__(self, folder, flags, count=2, devices=1):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        ranks = [
            {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(r),
            }
            for r in range(count)
        ]
        self.logs = [folder / f"rank-{r}.log" for r in range(count)]
        self.all = [
            context().Process(target=work, args=(flags, rank if count > 1 else {}, devices, log))
            for rank, log in zip(ranks, self.logs, strict=True)
        ]

    def __enter__(self):
        for process in self.all:
            process.start()
        return self

    def __exit__(self, *error):
        for process in self.all:
            process.kill()
            process.join()

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)


def finished(folder, flags, **processes):
    """Runs a training to its end; SHA-256 of its last checkpoint's arrays."""
    with Processes(folder, flags, **processes) as running:
        for process in running.all:
            process.join(90)
            assert process.exitcode == 0, running.said()
    return digest(folder)


def home(folder):
    return folder / "run" / "checkpoints" / "seed-0"


def digest(folder):
    newest = home(folder) / f"step-{checkpoint.steps(home(folder))[-1]:012d}"
    return hashlib.sha256((newest / "arrays.safetensors").read_bytes()).hexdigest()


def params_after(folder, step):
    arrays, leaves = (
        load_file(home(folder) / f"step-{step:012d}" / "arrays.safetensors"),
        checkpoint.manifest(home(folder), step=step).leaves,
    )
    found = {
        leaf["path"]: arrays[str(i)]
        for i, leaf in enumerate(leaves)
        if leaf["path"].startswith("['state'].params")
    }
    assert len(found) == 4
    return found


TRAIN = [*FLAGS, "--epochs", "40", "--distributed"]


def test_two_processes_are_one_with_two_devices(tmp_path):
    one_step = [*FLAGS, "--epochs", "1", "--batch-size", "1437"]  # all examples
    for name, more, settings in (
        ("two", ["--distributed"], {}),
        ("one", ["--devices", "2"], {"count": 1, "devices": 2}),
    ):
        (tmp_path / name).mkdir()
        finished(
            tmp_path / name, [*one_step, *more, "--out", str(tmp_path / name / "run")], **settings
        )
    two, one = (params_after(tmp_path / name, 1) for name in ("two", "one"))
    for path in one:
        np.testing.assert_allclose(two[path], one[path], rtol=0, atol=1e-6)
    written = {p.name for p in (tmp_path / "two" / "run").iterdir()}
    assert written == {"config.json", "metrics.jsonl", "metrics.json", "checkpoints", "train.png"}
    assert [(m["seed"], m["epoch"]) for m in _runs.read_metrics(tmp_path / "two" / "run")] == [
        (0, 0)
    ]


def test_where_one_dies_or_is_told_to_stop_both_end_and_the_run_goes_on_to_the_same_bits(tmp_path):
    """Five trials of either rank killed at a random moment, and a signal to one.

    Then the bits of a run that nobody disturbed.
    """
    rng, flags = np.random.default_rng(0), [*TRAIN, "--out", str(tmp_path / "run")]
    for victim in (0, 1, 1, 0, 1):
        before = len(checkpoint.steps(home(tmp_path)))
        with Processes(tmp_path, flags) as running:
            wait(running, lambda before=before: len(checkpoint.steps(home(tmp_path))) > before)
            time.sleep(rng.uniform(0, 0.3))
            running.all[victim].kill()
            other = running.all[1 - victim]
            other.join(30)
            assert other.exitcode not in (None, 0), running.said()
        flags = ["--resume", str(tmp_path / "run"), "--distributed"]
    assert checkpoint.manifest(home(tmp_path)).metadata["epoch"] < 40
    told(tmp_path, flags)
    disturbed = finished(tmp_path, flags)
    assert [(m["seed"], m["epoch"]) for m in _runs.read_metrics(tmp_path / "run")] == [
        (0, e) for e in range(40)
    ]
    (tmp_path / "whole").mkdir()
    assert (
        finished(tmp_path / "whole", [*TRAIN, "--out", str(tmp_path / "whole" / "run")])
        == disturbed
    )


def told(folder, flags):
    """A signal to one process stops both with a message."""
    before = len(checkpoint.steps(home(folder)))
    with Processes(folder, flags) as running:
        wait(running, lambda: len(checkpoint.steps(home(folder))) > before)
        os.kill(running.all[1].pid, signal.SIGTERM)
        for process in running.all:
            process.join(60)
        assert [process.exitcode for process in running.all] == [1, 1], running.said()
        assert (
            running.said().count(
                f"Go on: python -m experiments train --resume {folder / 'run'} --distributed"
            )
            == 2
        )


def wait(running, until):
    end = time.monotonic() + 90
    while not until():
        assert time.monotonic() < end, running.said()
        assert all(process.is_alive() for process in running.all), running.said()
        time.sleep(0.01)


BAD = [
    (
        {"JAX_PROCESS_ID": "1"},
        "`distributed`: JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES. "
        "Set all three",
    ),
    (
        dict(zip(_processes.VARIABLES, ("h:1", "2", "2"), strict=True)),
        "must be in 0 ... JAX_NUM_PROCESSES - 1, got 2 and 2.",
    ),
    (
        dict(zip(_processes.VARIABLES, ("h:1", "two", "0"), strict=True)),
        "must be in 0 ... JAX_NUM_PROCESSES - 1, got 0 and two.",
    ),
]


@pytest.mark.parametrize(("variables", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_variables_that_cannot_be_meant_are_told(monkeypatch, capsys, variables, message):
    for name in _processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--distributed"]) == 1
    assert message in capsys.readouterr().err


def train_on_own_batches(kind, rank, address, log):
    """What a process of two does: it has other batches than the other process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(address, 2, rank)
    batch = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)

    def batches(epoch):
        yield from [batch] * 3
        if rank == 1 and kind == "one more":
            yield batch
        elif rank == 1:
            raise OSError("the disk is gone")

    net = fnn.mlp((3, 2))
    rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    params = net.init(jax.random.key(0))
    settings = {"epochs": 9, "batch_size": 8, "key": jax.random.key(1)}
    mesh = fnn.sharding.make_mesh()
    fnn.fit(rule, optax.sgd(0.1), params, batches, mesh=mesh, **settings)


@pytest.mark.parametrize("kind", ["one more", "an error"])
def test_a_process_without_its_batch_ends_all_with_a_sentence(kind, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    processes = [
        context().Process(target=train_on_own_batches, args=(kind, rank, address, log))
        for rank, log in enumerate(logs)
    ]
    begun = time.monotonic()
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode not in (None, 0)
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - begun < 60  # with their start; the end itself is at once
    said = [log.read_text() for log in logs]
    if kind == "one more":
        sentence = "`data` of process 0 ended before batch 3 of epoch 0, which process 1 has"
        assert all(sentence in text for text in said)
    else:
        assert "Process 1 raised an error in batch 3 of epoch 0" in said[0]
        assert "OSError: the disk is gone" in said[1]
