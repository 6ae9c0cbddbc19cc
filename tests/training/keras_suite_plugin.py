"""A pytest plugin: Keras's own tests, with tfamp in the place of `Model.fit`.

`evaluate` and `predict` are replaced as well. `KERAS_SUITE_REPLICAS=2` puts
each test into the scope of that many logical CPU devices. Keras's tests are not
written for that: one that fails there before it calls ours tells nothing of
them, and counts as skipped. `KERAS_SUITE_STOCK=1` leaves Keras's own in place.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
import types

import keras
import pytest
import tensorflow as tf

import tfamp

REPLICAS = int(os.environ.get("KERAS_SUITE_REPLICAS", "1"))
IS_STOCK = os.environ.get("KERAS_SUITE_STOCK") == "1"
# Names of what the running test has called.
called: set[str] = set()

# Tests that need one of them import it when they run.
OPTIONAL = ("jax", "torch", "grain")


class Missing(importlib.abc.MetaPathFinder):
    """Skips the test that imports a package that is not installed.

    What Keras itself tries to import stays an ImportError.
    """

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in MISSING:
            return
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.endswith("_test.py"):
            pytest.skip(f"{name} is not installed")


def fit(model, x=None, y=None, batch_size=None, epochs=1, verbose="auto", **k):
    options = {"batch_size": batch_size, "epochs": epochs, "verbose": verbose}
    return tfamp.fit(model, x, y, **options, **k)


def evaluate(
    model,
    x=None,
    y=None,
    batch_size=None,
    verbose="auto",
    return_dict=False,
    **k,
):
    options = {"batch_size": batch_size, "return_dict": return_dict}
    return tfamp.evaluate(model, x, y, verbose=verbose, **options, **k)


def predict(model, x, batch_size=None, verbose="auto", **k):
    options = {"batch_size": batch_size, "verbose": verbose}
    return tfamp.predict(model, x, **options, **k)


def noted(function, name):
    """The function, which leaves word that a test has called it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if REPLICAS > 1 and report.failed and not called:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "fails before it calls ours")
    return report


def pytest_configure(config):
    for name in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{name}: of Keras's own tests")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * REPLICAS,
    )
    if REPLICAS > 1:
        case = importlib.import_module("keras.src.testing").TestCase
        case.setUp = set_up_in_scope(case.setUp)
    trainer = keras.src.backend.tensorflow.trainer.TensorFlowTrainer
    for function in (fit, evaluate, predict):
        name = function.__name__
        given = getattr(trainer, name) if IS_STOCK else function
        setattr(trainer, name, noted(given, name))


def pytest_collection_modifyitems(items):
    for name in ("orbax", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            for item in items:
                if f"{name}_" in item.path.name:
                    item.add_marker(pytest.mark.skip(f"no {name} here"))


@pytest.fixture(autouse=True)
def nothing_called():
    called.clear()


def set_up_in_scope(set_up):
    """A `setUp` that leaves the test, and what follows of `setUp`, in a scope.

    Not before: it clears the session, and with it the scope that it is in.
    """

    @functools.wraps(set_up)
    def in_scope(test):
        set_up(test)
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(REPLICAS)],
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        )
        scope = strategy.scope()
        scope.__enter__()

        def leave():
            if tf.distribute.get_strategy() is strategy:
                scope.__exit__(None, None, None)

        test.addCleanup(leave)

    return in_scope


MISSING = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
if "jax" in MISSING:
    # Keras's tests import it at their top, and most do not use it.
    sys.modules["jax"] = types.ModuleType("jax")
    sys.modules["jax"].__path__ = []
sys.meta_path.insert(0, Missing())

# That of Keras's repository, which is not installed.
sys.modules["conftest"] = types.ModuleType("conftest")
sys.modules["conftest"].skip_if_backend = lambda *_: lambda test: test
