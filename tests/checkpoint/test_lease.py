"""One job at a time in a folder, and the next when that is dead."""

import json
import multiprocessing
import os
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.checkpoint import lease as leases
from tfamp.checkpoint.lease import FILE_NAME, Lease
from tfamp.errors import Preempted

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.resumable_run"])


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(leases, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(leases, "_SETTLE_SECONDS", 0.02)


def on_other_host(monkeypatch):
    monkeypatch.setattr(leases.socket, "gethostname", lambda: "elsewhere")


def hold(directory, is_held):
    lease = Lease(str(directory))
    lease.take()
    is_held.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process of this machine that holds the folder."""
    is_held = processes.Event()
    process = processes.Process(
        target=hold, args=(tmp_path, is_held), daemon=True
    )
    process.start()
    assert is_held.wait(60)
    yield process
    process.kill()
    process.join(60)


def test_another_living_process_is_refused_and_named(holder, tmp_path):
    with pytest.raises(tfamp.InputError, match=f"process {holder.pid} on "):
        Lease(str(tmp_path)).take()


def test_one_that_stands_still_lives(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(tfamp.InputError, match=f"process {holder.pid} on "):
        Lease(str(tmp_path)).take()


def test_one_that_was_killed_is_followed_at_once(holder, tmp_path):
    holder.kill()
    holder.join(60)
    begin = time.monotonic()
    lease = Lease(str(tmp_path))
    lease.take()
    assert time.monotonic() - begin < leases.STALE_SECONDS
    lease.release()
    assert not os.listdir(tmp_path)


def test_one_of_another_host_lives_while_it_renews(tmp_path, monkeypatch):
    lease = Lease(str(tmp_path))
    lease.take()
    with monkeypatch.context() as patch:
        on_other_host(patch)
        with pytest.raises(tfamp.InputError, match=f"process {os.getpid()}"):
            Lease(str(tmp_path)).take()
    lease.release()


def test_one_of_another_host_that_is_silent_is_followed(
    tmp_path, monkeypatch, warnings_of_absl
):
    lease = Lease(str(tmp_path))
    lease.take()
    # As a machine that lost its power.
    lease._is_released.set()
    time.sleep(0.1)
    with monkeypatch.context() as patch:
        on_other_host(patch)
        other = Lease(str(tmp_path))
        other.take()
        assert "waiting 0 s" in warnings_of_absl[0]
    # It comes back, and leaves the folder to the other.
    with pytest.raises(tfamp.InputError, match="on elsewhere\\) took over"):
        lease.check()
    lease.release()
    other.check()
    other.release()


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch):
    lease = Lease(str(tmp_path))
    lease.take()
    lease._is_released.set()
    time.sleep(0.1)
    on_other_host(monkeypatch)
    with pytest.raises(Preempted):
        Lease(str(tmp_path), lambda: True).take()


def owner(folder):
    """Who the file says has the folder."""
    return json.loads((folder / FILE_NAME).read_text())["id"]


def test_a_number_that_another_process_has_now_is_nobodys(tmp_path):
    lease = Lease(str(tmp_path))
    old = {**lease._own, "started": "1", "id": "old", "renewals": 0}
    (tmp_path / FILE_NAME).write_text(json.dumps(old))
    lease.take()
    assert owner(tmp_path) == lease._own["id"]
    lease.release()


@pytest.mark.parametrize("content", ["", "half", "[1]", "{}"])
def test_a_file_that_says_nothing_is_followed_when_it_stays_so(
    tmp_path, content
):
    (tmp_path / FILE_NAME).write_text(content)
    lease = Lease(str(tmp_path))
    lease.take()
    assert owner(tmp_path) == lease._own["id"]
    lease.release()


def test_a_link_of_its_name_is_replaced(tmp_path):
    (tmp_path / "mine").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / FILE_NAME).symlink_to(tmp_path / "mine")
    lease = Lease(str(tmp_path / "folder"))
    lease.take()
    assert (tmp_path / "mine").read_text() == "{}"
    lease.release()


def test_an_emptied_folder_is_still_this_jobs(tmp_path):
    lease = Lease(str(tmp_path))
    lease.take()
    (tmp_path / FILE_NAME).unlink()
    lease.check()
    with pytest.raises(tfamp.InputError, match="uses"):
        Lease(str(tmp_path)).take()
    lease.release()


def test_fit_refuses_a_folder_in_use_and_frees_it_at_its_end(tmp_path):
    dataset = tf.data.Dataset.from_tensors((np.ones((2, 1)), np.ones((2, 1))))

    def fit(callbacks=()):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        tfamp.fit(
            model,
            dataset,
            callbacks=list(callbacks),
            checkpoint_dir=tmp_path,
            verbose=0,
        )

    def again(*_):
        with pytest.raises(tfamp.InputError, match="uses") as raised:
            fit()
        assert "\n" not in str(raised.value)

    fit([keras.callbacks.LambdaCallback(on_epoch_begin=again)])
    assert FILE_NAME not in os.listdir(tmp_path)
