"""A training that was stopped and goes on gives, bit for bit, what one that never stopped gives."""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_checkpoint import raw

import fnn
from fnn import losses, rules
from fnn.checkpoint import (
    Checkpointer,
    CheckpointError,
    Stopped,
    files,
    manifest,
    restore_params,
    running,
    save,
    steps,
)
from fnn.training.checkpointing import data_fingerprint, fingerprints

NET = fnn.mlp((5, 6, 3), "tanh")
WIDER = fnn.mlp((5, 7, 3), "tanh")
LOSS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(7)
PARAMS = jax.jit(NET.init)(jax.random.key(0))
BACKPROP = rules.backprop(NET, LOSS)
ADAM = optax.inject_hyperparams(optax.adam)(0.01)  # a state with weak types in it


def blobs(n=45):
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, n).astype(np.int32)
    return (rng.normal(size=(n, 5)) + 3 * np.eye(3, 5)[t]).astype(np.float32), t


DATA = blobs()


def batches(e):
    """An epoch of an iterable, in an order of its own."""
    order = np.random.default_rng(e).permutation(45)
    for i in range(0, 45, 4):
        yield DATA[0][order[i : i + 4]], DATA[1][order[i : i + 4]]


def spoiled(e):
    """From the third epoch on it learns nonsense."""
    return [(x, t if e < 2 else (t + 1) % 3) for x, t in batches(e)]


def norm(params, state, x, targets, weights):
    return {"b": jnp.abs(params[1].b).sum(), "x": x.sum()}


def train(folder, rule=BACKPROP, data=DATA, optimizer=ADAM, epochs=3, stop=None, **settings):
    """A training with all that can be had; `stop` is what may end it."""
    checkpoint = (
        None
        if folder is None
        else Checkpointer(folder, **{"seconds": 1e-9, "keep": 1000, "wait": True} | settings)
    )
    return fnn.fit(
        rule,
        optimizer,
        PARAMS,
        data,
        epochs=epochs,
        batch_size=4,
        key=KEY,
        validation=blobs(10),
        record=norm,
        record_every=5,
        checkpoint=checkpoint,
        callback=stop,
    )


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and list(
        map(raw, jax.tree.leaves(a))
    ) == list(map(raw, jax.tree.leaves(b)))


@pytest.fixture
def short_parts(monkeypatch):
    """Arrays are gone through in parts of five steps, and not in as many as half a second has."""
    monkeypatch.setattr(
        sys.modules["fnn.training.fit"],
        "paced",
        lambda: lambda first, n: ((i, min(i + 5, n)) for i in range(first, n, 5)),
    )


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    "data",
    [DATA, (*DATA, np.linspace(0, 2, 45, dtype=np.float32)), batches],
    ids=["arrays", "weighted", "iterable"],
)
def test_from_every_checkpoint_on_it_is_the_same_training(tmp_path, data):
    rule = rules.node_perturbation(NET, LOSS)
    expected = train(tmp_path / "whole", rule, data)
    there = steps(tmp_path / "whole")
    assert there == ([*range(1, 37)] if data is batches else [5, 10, 12, 17, 22, 24, 29, 34, 36])
    for step in (*there[:-1:5], there[-1]) if data is batches else there:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"step-{step:012d}", folder / f"step-{step:012d}")
        assert same(train(folder, rule, data), expected)
    _, history = train(None, rule, data)
    assert same(jax.tree.map(jnp.shape, history), jax.tree.map(jnp.shape, expected[1]))
    np.testing.assert_allclose(history.step_loss, expected[1].step_loss, rtol=1e-4)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("rule", rules.RULES, ids=lambda r: r.__name__)
def test_every_rule_goes_on_as_if_nothing_had_been(tmp_path, rule):
    made = rule(NET, LOSS)
    expected = train(tmp_path / "whole", made)

    def crash(e, metrics):
        if e == 1:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "crashed", made, stop=crash)
    assert steps(tmp_path / "crashed")[-1] == 24
    assert same(train(tmp_path / "crashed", made), expected)


@pytest.fixture
def own_handlers():
    """Python's own: what a shell starts in the background ignores Ctrl-C."""
    before = {each: signal.getsignal(each) for each in running.SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("own_handlers")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    train(tmp_path, epochs=2, stop=lambda e, metrics: os.kill(os.getpid(), signal.SIGINT))
    assert steps(tmp_path)[-1] == 24
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.usefixtures("own_handlers")
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, name, capfd):
    def told_at(step):
        def data(e):
            for i, batch in enumerate(batches(e)):
                if (e, i) == step:
                    os.kill(os.getpid(), getattr(signal, name))
                    time.sleep(0.2)  # it has arrived
                yield batch

        return data

    handlers = [signal.getsignal(each) for each in running.SIGNALS]
    # the signal comes while a batch is fetched; the step before it is the last that counts
    for step, done, count in (((0, 1), 1, 1), ((1, 3), 3, 15), ((2, 11), 11, 35)):
        with pytest.raises(
            Stopped,
            match=(
                rf"{name}: stopped in epoch {step[0]} after {done} steps of it; all is "
                r"saved in .*run. The"
            ),
        ):
            train(tmp_path / "run", data=told_at(step), seconds=None)
        assert steps(tmp_path / "run")[-1] == count
        assert (
            f"{name}: finishing the step and saving; once more to exit at once."
            in capfd.readouterr().err
        )
    assert [signal.getsignal(each) for each in running.SIGNALS] == handlers
    assert same(
        train(tmp_path / "run", data=batches, seconds=None), train(tmp_path / "whole", data=batches)
    )


@pytest.mark.usefixtures("own_handlers")
def test_the_second_ctrl_c_is_pythons_own(tmp_path):
    handlers = [signal.getsignal(each) for each in running.SIGNALS]

    def twice(e, metrics):
        os.kill(os.getpid(), signal.SIGINT)
        assert [signal.getsignal(each) for each in running.SIGNALS] == handlers
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=twice)


CHILD = """
import sys, time
import jax, optax, fnn, numpy as np
from fnn.checkpoint import Checkpointer
net = fnn.mlp((2, 2)); x = np.ones((4, 2), np.float32)
def data(e):
    for i in range(1000):
        print(e, i, flush=True)
        time.sleep({pause} if i else 0)
        yield x, x
fnn.fit(fnn.rules.backprop(net, fnn.losses.l2_loss), optax.sgd(0.1), net.init(jax.random.key(0)), \
data, epochs=9, batch_size=4,
        key=jax.random.key(0), checkpoint=Checkpointer(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("pause", "signals", "code"), [(0.05, 1, 1), (600, 2, -signal.SIGTERM)], ids=["one", "two"]
)
def test_one_signal_ends_a_process_with_its_message_and_two_at_once(tmp_path, pause, signals, code):
    command = [sys.executable, "-c", CHILD.format(pause=pause), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            while child.stdout.readline() != "0 1\n":
                assert child.poll() is None
            child.send_signal(signal.SIGTERM)
            assert (
                child.stderr.readline()
                == "SIGTERM: finishing the step and saving; once more to exit at once.\n"
            )
            if signals == 2:
                child.send_signal(signal.SIGTERM)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == code
    assert ("all is saved in" in said) == (signals == 1)
    assert bool(steps(tmp_path)) == (signals == 1)


def test_a_training_can_be_made_longer(tmp_path):
    train(tmp_path / "run", epochs=1)
    assert same(train(tmp_path / "run", epochs=4), train(tmp_path / "whole", epochs=4))


def test_one_that_its_callback_stopped_has_ended(tmp_path):
    expected = train(tmp_path, stop=lambda e, metrics: e == 1)
    assert expected[1].loss.shape == (2,)
    assert same(train(tmp_path), expected)


@pytest.mark.usefixtures("short_parts")
def test_fewer_epochs_than_are_done_are_an_error(tmp_path):
    train(tmp_path, epochs=2)
    with pytest.raises(
        CheckpointError,
        match=(r"is of 2 epochs and 0 steps \(24 steps in all\), but `epochs` is 1\. Pass more"),
    ):
        train(tmp_path, epochs=1)
    (tmp_path / "step-000000000024").rename(tmp_path / "gone")
    # in the middle of the second epoch
    shutil.copytree(tmp_path / "step-000000000017", tmp_path / "step-000000000099")
    with pytest.raises(
        CheckpointError, match=r"is of 1 epochs and 5 steps \(17 steps in all\), but `epochs` is 1"
    ):
        train(tmp_path, epochs=1)


def share_rows(params, state, x, targets, weights):
    return weights * x.sum(-1)


def test_what_is_recorded_of_batches_that_are_filled_up_goes_on(tmp_path):
    def fit(epochs, folder):
        return fnn.fit(
            BACKPROP,
            ADAM,
            PARAMS,
            DATA,
            epochs=epochs,
            batch_size=4,
            key=KEY,
            record=share_rows,
            checkpoint=Checkpointer(folder),
        )

    fit(1, tmp_path / "run")
    expected = fit(3, tmp_path / "whole")
    assert same(fit(3, tmp_path / "run"), expected)
    assert same(fit(3, tmp_path / "run"), expected)  # nothing left to train


def test_a_generator_that_can_be_gone_through_once_loses_no_batch(tmp_path):
    def fit(folder, stop=None):
        def data():
            for i, batch in enumerate(batches(0)):
                if i == stop:
                    raise RuntimeError("crash")
                yield batch

        saver = Checkpointer(folder, seconds=1e-9, wait=True)
        return fnn.fit(
            BACKPROP,
            ADAM,
            PARAMS,
            data(),
            epochs=1,
            batch_size=np.int64(4),
            key=KEY,
            record=norm,
            checkpoint=saver,
        )

    expected = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "run", stop=5)
    assert same(fit(tmp_path / "run"), expected)
    assert same(fit(tmp_path / "run"), expected)


def test_an_iterable_that_became_shorter_is_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, data=lambda e: (1 / 0 if i == 7 else b for i, b in enumerate(batches(e))))
    with pytest.raises(
        ValueError, match="`data` gave 3 batches in epoch 0, of which 7 were done before"
    ):
        train(tmp_path, data=lambda e: itertools.islice(batches(e), 3))


@pytest.mark.usefixtures("own_handlers")
def test_a_signal_while_the_last_checkpoint_is_written_is_heard(tmp_path, monkeypatch):
    write = files.write

    def told(home, content, arrays):
        if content["step"] == 36:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(home, content, arrays)

    monkeypatch.setattr(files, "write", told)
    with pytest.raises(Stopped, match="SIGTERM: stopped after the last epoch; all is saved in"):
        train(tmp_path, seconds=None)
    assert steps(tmp_path)[-1] == 36


def test_children_that_are_forked_meanwhile_hear_nothing_and_hold_nothing(tmp_path):
    """A worker that is terminated stops itself and not the training, which does not wait for those
    that live on."""
    context, alive = multiprocessing.get_context("fork"), []

    def work(e, metrics):
        for _ in range(2):
            child = context.Process(target=time.sleep, args=(600,), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forks beside threads
                child.start()
            alive.append(child)
        time.sleep(0.2)
        alive[-1].terminate()
        alive[-1].join(30)
        assert alive[-1].exitcode == -signal.SIGTERM

    try:
        train(tmp_path, epochs=1, stop=work)
        assert alive[0].is_alive()
        train(tmp_path, epochs=2)  # the lock went with the training
    finally:
        for child in alive:
            child.kill()
            child.join()


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    """Killed between the two renames, with no other checkpoint."""
    expected = train(tmp_path / "whole")
    train(tmp_path / "run", epochs=1, keep=1)
    (tmp_path / "run" / "step-000000000012").rename(
        tmp_path / "run" / ".replaced-step-000000000012"
    )
    assert same(train(tmp_path / "run", stop=lambda e, metrics: None if e else 1 / 0), expected)
    assert all(p.name.startswith("step-") for p in (tmp_path / "run").iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    seen = {}

    for best, choose in (("validation_loss", min), ("validation_accuracy", max), (None, None)):
        folder = tmp_path / str(best)
        train(
            folder,
            data=spoiled,
            epochs=7,
            keep=2,
            best=best,
            seconds=None,
            stop=lambda e, m: seen.update({12 * (e + 1): m}),
        )
        values = {step: metrics[best] for step, metrics in seen.items()} if best else {}
        expected = {72, 84} | (
            {min(step for step, v in values.items() if v == choose(values.values()))}
            if best
            else set()
        )
        assert set(steps(folder)) == expected
        assert not best or len(expected) == 3
        assert sorted(p.name for p in folder.iterdir()) == [
            f"step-{step:012d}" for step in sorted(expected)
        ]
    assert manifest(folder).metadata["metrics"] == seen[84]


def test_a_metric_that_is_not_measured_is_an_error_that_lists_those_that_are(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            "must be a metric of this training, loss, validation_loss, validation_accuracy; got "
            "'acc'"
        ),
    ):
        train(tmp_path / "run", best="acc")
    assert not (tmp_path / "run").exists()  # before any training


def test_a_checkpoint_is_left_out_while_the_last_is_being_written_but_never_the_best_or_the_last(
    tmp_path, monkeypatch
):
    slow, write = threading.Event(), files.write

    def blocked(*args):
        slow.wait(60)
        return write(*args)

    monkeypatch.setattr(files, "write", blocked)
    best = {"best": "validation_loss", "mode": "max"}  # the first epoch is the worst
    train(
        tmp_path / "free",
        epochs=6,
        wait=False,
        seconds=None,
        stop=lambda e, metrics: slow.set() if e == 4 else None,
        **best,
    )
    assert steps(tmp_path / "free")[0] == 12
    assert steps(tmp_path / "free")[-1] == 72
    assert not {24, 36, 48} & set(steps(tmp_path / "free"))


@pytest.mark.parametrize("saved", [False, True], ids=["not saved", "saved"])
def test_one_copy_of_the_state_more_is_held_while_a_checkpoint_is_written_and_else_none(
    tmp_path, monkeypatch, saved
):
    written, live = threading.Event(), []
    monkeypatch.setattr(files, "write", lambda *args: written.wait(60))
    net = fnn.mlp((5, 13, 3), "tanh")
    params = jax.jit(net.init)(jax.random.key(0))

    def count(e, metrics):
        live.append(sum(array.shape == (5, 13) for array in jax.live_arrays()))
        if e == 4:
            written.set()

    saver = Checkpointer(tmp_path, seconds=None) if saved else None
    fnn.fit(
        rules.backprop(net, LOSS),
        optax.adam(0.1),
        params,
        DATA,
        epochs=5,
        batch_size=4,
        key=KEY,
        checkpoint=saver,
        callback=count,
    )
    given, state = 1, 3  # the parameters; parameters and two moments
    assert live == [given + state] + [given + state * (2 if saved else 1)] * 4


def test_every_second_epoch_and_the_last_are_saved(tmp_path):
    train(tmp_path, epochs=5, every=2, seconds=None, metadata={"note": "kept"})
    assert steps(tmp_path) == [24, 48, 60]
    assert json.loads((tmp_path / "step-000000000060" / "manifest.json").read_text())["metadata"][
        "metadata"
    ] == {"note": "kept"}


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    train("run", seconds=None, stop=lambda e, metrics: os.chdir(tmp_path / "other"))
    assert steps(tmp_path / "run") == [12, 24, 36]
    assert not any((tmp_path / "other").iterdir())


def test_what_killed_processes_left_goes_even_where_nothing_is_to_do(tmp_path):
    train(tmp_path)
    (tmp_path / ".unfinished-1234").mkdir()
    train(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


@pytest.mark.parametrize("step", [12, 36], ids=["first", "last"])
def test_an_error_of_saving_ends_the_training_and_loses_nothing(tmp_path, monkeypatch, step):
    params, history = train(tmp_path / "whole")
    write = files.save_file

    def full(arrays, path):
        if step == 12 or f"{step:012d}" in str(path):
            raise OSError(28, "No space left on device")
        write(arrays, path)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(CheckpointError, match=rf"step-{step:012d}: .*No space left") as caught:
        train(tmp_path / "run", seconds=None)
    error = pickle.loads(pickle.dumps(caught.value))
    done = len(error.history.loss)
    assert done in ((1, 2) if step == 12 else (3,))
    np.testing.assert_array_equal(error.history.loss, history.loss[:done])
    assert done < 3 or same(error.params, params)


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody may write")
def test_a_folder_that_is_read_only_is_refused_before_training(tmp_path):
    def batches():
        raise AssertionError("trains")

    (tmp_path / "file").write_text("")
    for folder in ("/proc/self", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            train(folder, data=lambda e: batches())


def test_a_save_into_the_folder_of_a_training_is_refused_and_the_training_goes_on(tmp_path):
    said = []

    def callback(e, metrics):
        with pytest.raises(CheckpointError, match=r"or a `fit` of this one\. Wait") as caught:
            save(tmp_path / "run", PARAMS)
        said.append(caught.value.path)

    expected = train(tmp_path / "whole")
    assert same(train(tmp_path / "run", stop=callback), expected)
    assert said == [tmp_path / "run"] * 3


def test_a_folder_of_other_checkpoints_is_refused(tmp_path):
    save(tmp_path, PARAMS)
    with pytest.raises(CheckpointError, match="is no checkpoint of `fit`"):
        train(tmp_path)


def test_a_finished_run_says_so(tmp_path, capsys):
    train(tmp_path, epochs=2)
    train(tmp_path, epochs=3)
    assert capsys.readouterr().err == ""
    train(tmp_path, epochs=3)
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: this run is finished after 36 steps. Its settings: ")
    assert "'batch_size': 4" in said


@pytest.mark.parametrize(
    ("best", "choose"), [("validation_loss", np.argmin), ("validation_accuracy", np.argmax)]
)
def test_the_best_params_are_one_call(tmp_path, best, choose):
    values = []
    settings = {"best": best, "keep": 1, "seconds": None, "epochs": 6, "data": spoiled}
    params, _ = train(tmp_path, stop=lambda e, metrics: values.append(metrics[best]), **settings)
    step = 12 * (int(choose(values)) + 1)
    assert steps(tmp_path) == sorted({step, 72})
    assert same(restore_params(tmp_path), params)
    found = restore_params(tmp_path, best=True)
    assert same(found, restore_params(tmp_path / f"step-{step:012d}"))
    assert not same(found, params)


# The same training, or another one


def fingerprints_of(rule=BACKPROP, optimizer=ADAM, weights=None):
    state = fnn.training.init(rule, optimizer, PARAMS, KEY)
    found = fingerprints(rule, optimizer, state, (DATA[0][:4], DATA[1][:4], weights))
    return found["rule"], found["optimizer"]


def rate(step):
    return 0.1 / (1 + step)


def other_rate(step):
    return 0.1 / (2 + step)


SAME_RULE = [
    (optax.inject_hyperparams(optax.adam)(0.02), "another rate that is in the state"),
    (optax.adam(0.01), "adam"),
    (optax.adam(0.02), "another rate"),
    (optax.adam(0.01, b1=0.8), "another b1"),
    (optax.sgd(rate), "a schedule"),
    (optax.sgd(other_rate), "another schedule"),
    (optax.sgd(optax.constant_schedule(0.1)), "a constant schedule"),
    (optax.lbfgs(), "a line search"),
    (optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()), "the value"),
]
SAME_OPTIMIZER = [
    rules.backprop(fnn.mlp((5, 6, 3), "relu"), LOSS),
    rules.backprop(fnn.mlp((5, 6, 3), "sigmoid"), LOSS),
    rules.node_perturbation(NET, LOSS),
    rules.private_sgd(NET, LOSS, noise_multiplier=0),
    rules.private_sgd(NET, LOSS, noise_multiplier=5),
    rules.private_sgd(NET, LOSS, noise_multiplier=5, max_norm=2.0),
    rules.private_sgd(NET, LOSS, noise_multiplier=lambda step: 5.0 / (1 + step)),
]


@pytest.mark.usefixtures("as_users_run")
def test_fingerprints_differ_where_a_number_does():
    optimizers = [fingerprints_of(optimizer=optimizer) for optimizer, _ in SAME_RULE]
    optimizers.append(fingerprints_of())
    assert len({of for of, _ in optimizers}) == 1
    assert len({of for _, of in optimizers}) == len(optimizers)
    made = [fingerprints_of(rule) for rule in SAME_OPTIMIZER] + [fingerprints_of()]
    assert len({of for of, _ in made}) == len(made)
    again = rules.backprop(fnn.mlp((5, 6, 3), "tanh"), LOSS)
    optimizer = optax.inject_hyperparams(optax.adam)(0.01)
    assert fingerprints_of(again, optimizer) == fingerprints_of()


FINGERPRINTS = """
import sys
sys.path.insert(0, "tests")
import test_resume
with test_resume.jax.numpy_dtype_promotion("standard"):
    rules = [test_resume.BACKPROP, *test_resume.SAME_OPTIMIZER]
    print([test_resume.fingerprints_of(rule) for rule in rules])
"""


@pytest.mark.usefixtures("as_users_run")
def test_fingerprints_are_the_same_in_another_process():
    env = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", "-c", FINGERPRINTS]
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert eval(said) == [fingerprints_of(rule) for rule in (BACKPROP, *SAME_OPTIMIZER)]


def test_the_fingerprint_of_data_is_that_of_shapes_dtypes_and_rows():
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    changed = x.copy()
    changed[7, 1] += 1
    others = [x[:19], x.astype(np.float64), changed, x[::-1], x.reshape(20, 1, 3)]
    found = [data_fingerprint((array, None)) for array in (x, *others)]
    assert len(set(found)) == len(found)
    assert data_fingerprint((jnp.asarray(x),)) == found[0]
    large = np.lib.stride_tricks.as_strided(x, (10**7, 1000), (0, 0))  # 40 GB, of no memory
    assert data_fingerprint((large,)).startswith("float32[10000000, 1000] ")


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with (
        running.saving(Checkpointer(tmp_path)),
        pytest.raises(CheckpointError, match="another process saves its run here"),
    ):
        train(tmp_path)
    train(tmp_path, epochs=1)


def test_threads_may_train_too(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert same(found[0], train(tmp_path / "whole"))


def test_parts_grow_until_they_take_their_time(monkeypatch):
    epochs = sys.modules["fnn.training.epoch"]
    clock = [0.0]
    monkeypatch.setattr(epochs.time, "monotonic", lambda: clock[0])
    segments, found = epochs.paced(1.0), []
    for start, stop in segments(3, 1000):
        found.append((start, stop))
        clock[0] += (stop - start) * (0.01 if start < 500 else 0.02)
    assert found[0][0] == 3
    assert found[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    sizes = [stop - start for start, stop in found]
    assert sizes[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert max(sizes) == 64
    assert sizes[-2] == 32


OTHERS = [
    ({"batch_size": 5}, "`batch_size` was 4 and is 5"),
    ({"rule": rules.autodiff(NET, LOSS)}, "`rule` was 'backprop' and is 'autodiff'"),
    ({"data": blobs(46)}, "`examples` was 45 and is 46"),
    ({"key": jax.random.key(8)}, "`key` was '.*' and is"),
    ({"validation": None}, "`validation` was .* and is None"),
    ({"record_every": 2}, "`record_every` was 5 and is 2"),
    ({"record": None}, "`records` was True and is False"),
    ({"optimizer": optax.sgd(0.1)}, r"the tree is another one than `like`"),
    (
        {"optimizer": optax.inject_hyperparams(optax.adam)(0.02), "batch_size": 5},
        "`batch_size` was 4 and is 5; .*`program of the optimizer` was '.*' and is '.*'. Pass what",
    ),
    (
        {"rule": rules.backprop(fnn.mlp((5, 6, 3), "relu"), LOSS)},
        "training: `program of the rule` was '.*' and is '.*'. Pass what",
    ),
    ({"data": (DATA[0] + 1, DATA[1])}, r"training: `data` was 'float32\[45, 5\] .* and is"),
    (
        {"rule": rules.backprop(WIDER, LOSS), "params": WIDER.init(KEY)},
        r"\['state'\].params\[0\]\[0\].w is float32\[5, 6\], but",
    ),
    ({"checkpoint": "runs"}, "`checkpoint` must be a `fnn.checkpoint.Checkpointer`, got 'runs'"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS, ids=[message[:30] for _, message in OTHERS])
def test_the_checkpoint_of_another_training_is_refused(tmp_path, change, message):
    settings = {
        "rule": BACKPROP,
        "optimizer": ADAM,
        "params": PARAMS,
        "data": DATA,
        "epochs": 1,
        "batch_size": 4,
        "key": KEY,
        "validation": blobs(10),
        "record": norm,
        "record_every": 5,
        "checkpoint": Checkpointer(tmp_path),
    }
    fnn.fit(**settings)
    with pytest.raises((CheckpointError, TypeError), match=message):
        fnn.fit(**settings | change)
    fnn.fit(**settings)


@pytest.mark.usefixtures("as_users_run")
def test_another_noise_is_refused_or_warned_of(tmp_path):
    quiet, loud = (rules.private_sgd(NET, LOSS, noise_multiplier=noise) for noise in (0, 5))
    train(tmp_path, quiet, epochs=1)
    with pytest.raises(CheckpointError, match="`program of the rule` was"):
        train(tmp_path, loud, epochs=2)
    with pytest.warns(UserWarning, match="is of another training: `program of the rule` was"):
        _, history = train(tmp_path, loud, epochs=2, on_change="warn")
    assert history.loss.shape == (2,)
    assert steps(tmp_path)[-1] == 24


BAD = [
    ({"folder": 3}, TypeError, "`folder` must be a path, got 3"),
    ({"every": 0}, ValueError, "`every` must be a whole number above 0, got 0"),
    ({"keep": 1.5}, TypeError, "`keep` must be a whole number above 0, got 1.5"),
    ({"seconds": -1}, ValueError, "`seconds` must be a finite number above 0, got -1"),
    ({"mode": "least"}, ValueError, "Unknown mode 'least'"),
    ({"on_change": "ask"}, ValueError, "Unknown on_change 'ask'"),
    ({"metadata": [1]}, TypeError, "`metadata` must be a dict, got \\[1\\]"),
    ({"metadata": {"rate": np.float32(1)}}, TypeError, "`metadata` must be what JSON can hold"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), BAD, ids=[message[:20] for *_, message in BAD]
)
def test_a_setting_that_cannot_be_meant_is_an_error(change, kind, message):
    with pytest.raises(kind, match=message):
        Checkpointer(**{"folder": "run"} | change)
