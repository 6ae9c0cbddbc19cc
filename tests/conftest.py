"""Fixtures and tolerances that every test shares.

The process gets four logical CPU devices before TensorFlow starts, so that
MirroredStrategy is tested for real; a test that needs another device layout
runs in a process of its own.
"""

import functools
import gc
import json
import pathlib
import signal

import jsonschema
import keras
import pytest
import tensorflow as tf
from absl import logging
from packaging.version import Version

from tfamp.precision.policy import forget_precision

ROOT = pathlib.Path(__file__).parent.parent

# Relative and absolute agreement of float32 results that were summed in
# another order (replicas, microbatches, XLA).
FLOAT32_ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


def mostly_long(cases, *, always, mark=pytest.mark.long):
    """Cases for `parametrize`: those not in `always` are marked `long`."""
    cases = list(cases)
    missing = [case for case in always if case not in cases]
    if missing:
        raise ValueError(f"{missing} are no cases of {cases}")
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in always else mark,
        )
        for case in cases
    ]


mostly_slow = functools.partial(mostly_long, mark=pytest.mark.slow)


def first_always(cases, number):
    """Cases for `parametrize`: those after the first ones are marked `slow`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if i < number else pytest.mark.slow,
        )
        for i, case in enumerate(cases)
    ]


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="also run the tests marked `slow` or `long`",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            for mark in {"slow", "long"} & {
                m.name for m in item.iter_markers()
            }:
                item.add_marker(
                    pytest.mark.skip(reason=f"{mark}: run with --long")
                )


# Before, it asks a `tf.Variable` for what only Keras's have.
MUON_WORKS = Version(keras.__version__) >= Version("3.13")

# What the oldest Keras that is supported lacks.
LATER = (
    *("MultiOptimizer", "OptimizerMap", "ScheduleFreeAdamW", "Muon"),
    "ReversibleEmbedding",
)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skips a test of a class that this Keras does not have."""
    try:
        return (yield)
    except AttributeError as error:
        places = (keras.optimizers, keras.layers)
        if error.obj in places and error.name in LATER:
            pytest.skip(f"Keras {keras.__version__} has no {error.name}")
        raise


def pytest_configure(config):
    # A shell starts what it puts in the background without Ctrl-C, and so
    # would be the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if Version(keras.__version__) < Version("3.13"):
        # Keras 3.10 warns of every functional model that it loaded.
        config.addinivalue_line(
            "filterwarnings",
            "ignore:The structure of `inputs` doesn't match:UserWarning",
        )
    # Graphs are many small objects that live long: looking through them again
    # and again takes a tenth of the suite's time.
    gc.set_threshold(50_000, 20, 50)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 4,
    )


@pytest.fixture(autouse=True)
def fresh_global_state():
    """Each test starts with one seed and float32, and leaves them so."""
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)
    forget_precision()


@pytest.fixture(
    params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda n: f"{n}-replicas",
)
def strategy(request, mirrored):
    """MirroredStrategy over 1, 2 and 4 logical CPU devices."""
    return mirrored(request.param)


@pytest.fixture(scope="session")
def mirrored():
    """Makes a MirroredStrategy over that many logical CPU devices."""

    # TensorFlow's default collectives mix up two strategies of one process:
    # two replicas get them, as users do, and always the same strategy.
    @functools.cache
    def make(num_replicas):
        return tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(num_replicas)],
            cross_device_ops=None
            if num_replicas == 2
            else tf.distribute.ReductionToOneDevice(),
        )

    return make


@pytest.fixture
def warnings_of_absl(monkeypatch):
    """The lines that tfamp warns with, as they come."""
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


@pytest.fixture(scope="session")
def fits_schema():
    """Checks a record against its schema in docs/schemas."""
    folder = ROOT / "docs" / "schemas"

    def check(record):
        name = record["schema"].removeprefix("tfamp.").removesuffix("/1")
        schema = json.loads((folder / f"{name}.schema.json").read_text())
        jsonschema.validate(record, schema)

    return check
