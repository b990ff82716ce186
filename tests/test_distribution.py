"""Data-parallel training on CPU devices: in one process, by two, what happens when a worker dies, and what is refused."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unet_fast import cli, distribution, training
from unet_fast.config import TrainConfig
from unet_fast.distribution import Cluster, Distribution, WorkerLost
from unet_fast.errors import UserError

HERE = Path(__file__).parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("TF_CPP_MIN_LOG_LEVEL", "TF_CONFIG")}
ENVIRONMENT |= {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""}
# As the command line sets it for several machines; and XLA is not to spend time on code that runs so few times.
FORKED = {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder that tests/distributed_runs.py filled."""
    folder = tmp_path_factory.mktemp("distributed")
    program = [sys.executable, HERE / "distributed_runs.py", folder]
    done = subprocess.run(program, env=ENVIRONMENT | FORKED, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def results(folder, part):
    return json.loads((folder / "results.json").read_text())[part]


def state(run):
    """Weights, optimizer and dropout of a run, and how far it is."""
    with np.load(run / "last" / "state.npz") as arrays:
        arrays = dict(arrays)
    return arrays, json.loads(str(arrays.pop("progress")))


def history(run):
    with (run / "history.csv").open(newline="") as file:
        return [[float(row[key]) for key in ("step", "lr", "loss", "val_loss")] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["two", "workers"])
def test_two_replicas_are_one_device_with_the_doubled_batch(folder, name):
    """Two devices under XLA, and two workers of which one was killed; with all that depends on a batch or its gradient."""
    assert results(folder, "local") == 0, (folder / "local.err").read_text()
    ours, theirs = state(folder / name), state(folder / "one")
    assert ours[1]["step"] == theirs[1]["step"] and ours[1]["replicas"] == 2
    assert ours[0].keys() == theirs[0].keys()
    for key, array in ours[0].items():
        np.testing.assert_allclose(array, theirs[0][key], err_msg=key, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(history(folder / name), history(folder / "one"), rtol=1e-5)


def test_the_run_that_is_compared_with_was_reduced_and_stopped_early(folder):
    """Else the test above would not see whether the chief's decisions reach all replicas."""
    rows = history(folder / "one")
    assert rows[-1][1] < rows[0][1] and rows[-1][0] < 20


def test_an_overflow_on_one_replica_is_left_out_by_all(folder):
    with np.load(folder / "replicas.npz") as result:
        for after in result["skipped"]:
            np.testing.assert_array_equal(after, result["before"])
        assert result["scales"].tolist() == [512.0, 512.0]


def test_replicas_drop_out_differently_and_stay_the_same(folder):
    with np.load(folder / "replicas.npz") as result:
        first, second = result["weights"]
        np.testing.assert_array_equal(first, second)
        assert np.any(first != result["before"])
        # The second's dropout follows from the first's, which is what a run is resumed from.
        ours, theirs = result["dropout"].tolist()
        assert theirs == [ours[0] + 1, ours[1]] and ours[1] == 2


def test_devices_that_are_refused(folder):
    errors = json.loads((folder / "errors.json").read_text())
    for name, given in (("devices", "CPU:0, CPU:5"), ("twice", "CPU:0, CPU:0"), ("order", "CPU:1, CPU:0")):
        assert f"of CPU:0, CPU:1; got {given}" in errors[name]
    assert "trained by 1 replicas, got 2" in errors["replicas"]


# Two workers


def the_line(file):
    """The only line of what a worker printed to standard error."""
    (line,) = file.read_text().splitlines()
    return line


def test_a_killed_worker_ends_the_other_with_one_line(folder):
    killed = results(folder, "killed")
    assert killed["status"] == [2, -9]
    assert killed["seconds"] < 60
    line = the_line(folder / "killed-0.err")
    assert "lost a worker" in line and "start all of 127.0.0.1:" in line and "--resume" in line
    assert "2 replicas on 2 hosts" in (folder / "killed-0.out").read_text()
    assert (folder / "killed-1.out").read_text() == ""
    assert not (folder / "elsewhere").exists(), "a worker that is not the chief wrote files"


def test_workers_go_on_from_the_last_checkpoint(folder):
    assert results(folder, "resumed")["status"] == [0, 0]
    assert [(folder / f"resumed-{i}.err").read_text() for i in range(2)] == ["", ""]
    assert (folder / "resumed-0.out").read_text().startswith("resumed at step 4 of 20\n")
    assert (folder / "resumed-1.out").read_text() == ""


def test_what_workers_tell_each_other(folder):
    assert results(folder, "asking")["status"] == [0, 0], (folder / "asking-0.err").read_text()
    for i in range(2):
        told = json.loads((folder / f"asked-{i}.json").read_text())
        assert told["gathered"] == [10, 11]
        assert told["any"] == [False, True, True]
        assert told["chief"] == [["float32", 0.5, 0.5], ["uint32", 7, 1]]
        assert "expected all hosts to have the same options, got others on 127.0.0.1:" in told["refused"]
        assert told["signal"], "a signal was not handled while waiting for the other worker"


def test_a_worker_without_the_others_gives_up(folder):
    assert results(folder, "alone") == 2
    line = the_line(folder / "alone.err")
    assert "and the others of 127.0.0.1:" in line and "within 2 s" in line
    assert not (folder / "alone").exists()


def test_tensorflow_is_silent_on_several_hosts_alone(monkeypatch, tmp_path):
    """Else its pages on a lost worker would surround the one line; the tests above set what the command line sets here."""
    levels = []
    monkeypatch.setattr(cli, "_prepare_tensorflow", levels.append)
    arguments = ["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    assert [cli.main(arguments), cli.main([*arguments, "--hosts", "a:1"])] == [2, 2]
    monkeypatch.setenv("TF_CONFIG", "{")
    assert cli.main(arguments) == 2
    assert levels == ["2", "3", FORKED["TF_CPP_MIN_LOG_LEVEL"]]


# What is refused


def test_a_taken_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster = Cluster.of([host, "127.0.0.1:1"], 0, environment={})
        with pytest.raises(UserError, match=rf"{host}: cannot listen there \(Address already in use\).*another"):
            training.train(TrainConfig(data="synthetic"), tmp_path / "run", cluster=cluster)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("hosts", "index", "message"),
    [
        (["a:1"], 0, "at least two hosts, each once, got a:1"),
        (["a:1", "a:1"], 0, "at least two hosts, each once, got a:1, a:1"),
        (["a:1", "b"], 0, "expected host:port, such as gpu1:2222, got 'b'"),
        (["a:1", "b:99999"], 0, "got 'b:99999'"),
        (["a:1", "b:2"], 2, "--host-index from 0 to 1, got 2"),
        (["127.0.0.1:1", "127.0.0.1:2"], None, "found 127.0.0.1:1 and 127.0.0.1:2; say which one with --host-index"),
        (None, 1, "expected --hosts with --host-index 1"),
    ],
)
def test_hosts_that_are_refused(hosts, index, message):
    with pytest.raises(UserError, match=message):
        Cluster.of(hosts, index, environment={})


def test_this_machine_is_found_among_the_hosts():
    assert Cluster.of(["198.51.100.1:1", "127.0.0.1:2"], environment={}).index == 1
    with pytest.raises(UserError, match="found none"):
        Cluster.of(["198.51.100.1:1", "203.0.113.1:2"], environment={})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}, 1),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:2"]}, "task": {"type": "worker", "index": 0}}, 1),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:2"]}, "task": {"type": "chief", "index": 0}}, 0),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}, None),
        ({}, None),
    ],
)
def test_tf_config(content, expected):
    cluster = Cluster.of(environment={"TF_CONFIG": json.dumps(content)})
    assert (cluster and (cluster.hosts, cluster.index)) == (
        expected if expected is None else (("a:1", "b:2"), expected)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG: expected JSON"),
        ('{"cluster": {"ps": ["a:1"], "worker": ["b:1"]}}', "expected tasks of type chief and worker"),
    ],
)
def test_a_tf_config_that_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Cluster.of(environment={"TF_CONFIG": text})
    with pytest.raises(UserError, match="either --hosts or the environment variable TF_CONFIG"):
        Cluster.of(["a:1", "b:1"], 0, environment={"TF_CONFIG": text})


def test_more_gpus_than_there_are(tmp_path):
    with pytest.raises(UserError, match="expected 99 GPUs for --gpus 99, found"):
        training.train(TrainConfig(data="synthetic", gpus=99), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_worker_is_one_line():
    """What TensorFlow raises becomes one line in a cluster, and stays what it is without."""
    lost = distribution.tf.errors.UnavailableError(None, None, "Socket closed")
    with pytest.raises(distribution.tf.errors.UnavailableError), Distribution():
        raise lost
    alone = Distribution()
    alone._cluster = Cluster(("a:1", "b:1"), 0)
    with pytest.raises(WorkerLost, match="start all of a:1, b:1 again with --resume"), alone:
        raise lost
