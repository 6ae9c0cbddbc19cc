"""What is private to TensorFlow is where tfamp looks for it."""

import functools
import gc
import json
import logging
import subprocess
import sys
import textwrap

import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

from tests.conftest import ROOT
from tfamp import tensorflow_internals

# --- What repeats ----------------------------------------------------------


def test_a_seed_and_determinism_are_seen_once_they_are_asked_for():
    # Nobody can take them back.
    script = """
        import tensorflow as tf

        from tfamp.tensorflow_internals import (
            has_global_seed,
            is_op_determinism_enabled,
        )

        print(has_global_seed(), is_op_determinism_enabled(), end=" ")
        tf.random.set_seed(1)
        print(has_global_seed(), is_op_determinism_enabled(), end=" ")
        tf.config.experimental.enable_op_determinism()
        print(has_global_seed(), is_op_determinism_enabled())
    """
    assert last_line_of(script) == "False False True False True True"


def test_the_global_generator_is_seen_and_not_made():
    # Whatever a program that ran before has left.
    tf.random.set_global_generator(None)
    assert tensorflow_internals.global_generator() is None
    try:
        made = tf.random.get_global_generator()
        assert tensorflow_internals.global_generator() is made
    finally:
        tf.random.set_global_generator(None)


# --- The runtime -----------------------------------------------------------


def test_a_registered_function_is_found_by_name_until_it_is_forgotten():
    traced = tf.function(lambda x: 3 * x).get_concrete_function(
        tf.TensorSpec([], "float32")
    )
    definition = traced.function_def
    definition.signature.name = "tripled_here"
    arguments = ("tripled_here", 1, [tf.constant(2.0)], [])

    names = tensorflow_internals.register_functions([definition])
    assert names == ["tripled_here"]
    (result,) = tensorflow_internals.run_operation(*arguments)
    assert float(result) == 6.0

    tensorflow_internals.forget_functions(names)
    # Those that are gone are no error.
    tensorflow_internals.forget_functions(names)
    with pytest.raises(tf.errors.NotFoundError):
        tensorflow_internals.run_operation(*arguments)


def test_an_operation_runs_by_the_attributes_of_a_graph():
    # All inputs of a list, then the one after it.
    x = [tf.constant([1, 2]), tf.constant([3]), tf.constant(0)]
    int32 = tf.int32.as_datatype_enum
    attributes = ["N", 2, "T", int32, "Tidx", int32]
    (joined,) = tensorflow_internals.run_operation("ConcatV2", 1, x, attributes)
    assert joined.numpy().tolist() == [1, 2, 3]
    # Of no input, to a dtype that it is told.
    half = tf.float16.as_datatype_enum
    (cast,) = tensorflow_internals.run_operation(
        "Cast", 1, [x[1]], ["SrcT", int32, "DstT", half, "Truncate", False]
    )
    assert cast.dtype == tf.float16
    assert float(cast[0]) == 3.0


# --- Strategies ------------------------------------------------------------


def test_each_strategy_numbers_its_collectives_once_and_apart():
    strategies = [
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) for _ in range(2)
    ]
    groups = []
    for strategy in strategies:
        tensorflow_internals.separate_collectives(strategy)
        own = strategy.extended._collective_ops
        assert strategy.extended._cross_device_ops is own
        tensorflow_internals.separate_collectives(strategy)
        assert strategy.extended._collective_ops is own
        groups.append(own._collective_keys._group_key)
    # Far enough for all groups that one of them has.
    assert abs(groups[0] - groups[1]) >= 1000

    to_one = tf.distribute.ReductionToOneDevice()
    chosen = tf.distribute.MirroredStrategy(["CPU:0"], to_one)
    tensorflow_internals.separate_collectives(chosen)
    assert chosen.extended._cross_device_ops is to_one
    tensorflow_internals.separate_collectives(tf.distribute.get_strategy())


def test_variables_begin_with_what_a_function_says():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice()
    )
    seen = []

    def first_value(own, replica_id, device, primary_var, **kwargs):
        seen.append((replica_id, device[-5:], kwargs["name"]))
        value = own(replica_id, device, primary_var, **kwargs)
        return value + 10 if replica_id == 0 else lambda: value() + 100

    tensorflow_internals.replace_first_values(strategy, first_value)
    with strategy.scope():
        variable = tf.Variable(1.0, name="weight")
    values = strategy.experimental_local_results(variable)
    assert [float(value) for value in values] == [11.0, 111.0]
    assert seen[0] == (0, "CPU:0", "weight")
    assert seen[1][:2] == (1, "CPU:1")


# --- A cluster: coordination -----------------------------------------------


@pytest.fixture(scope="module")
def worker():
    """What the one worker of a cluster found, in a process of its own."""
    script = """
        import json
        import socket

        import tensorflow as tf

        from tfamp import tensorflow_internals

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        tensorflow_internals.bound_joining({"worker": 1}, 10)
        # Too late: the first stays.
        tensorflow_internals.bound_joining({"worker": 1}, 20)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(
            tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec({"worker": [f"127.0.0.1:{port}"]}),
                task_type="worker",
                task_id=0,
                rpc_layer="grpc",
            )
        )
        config = tf.__internal__.eager_context.get_config()
        service = config.experimental.coordination_config
        found = {
            "milliseconds": service.cluster_register_timeout_in_ms,
            "leader": service.service_leader,
            "jobs": {
                job.name: job.num_tasks
                for job in service.coordinated_job_list
            },
        }

        def raised_by(function, *arguments):
            try:
                function(*arguments)
            except tf.errors.OpError as error:
                return [type(error).__name__, error.message]

        def doubled(own, replica_id, device, primary_var, **kwargs):
            value = own(replica_id, device, primary_var, **kwargs)
            return lambda: 2 * value()

        tensorflow_internals.replace_first_values(strategy, doubled)
        with strategy.scope():
            found["variable"] = float(tf.Variable(3.0).numpy())

        tensorflow_internals.put_text("key", "grün")
        found["text"] = tensorflow_internals.text_under("key", 1000)
        found["no text"] = raised_by(
            tensorflow_internals.text_under, "no key", 100
        )
        found["lives"] = raised_by(tensorflow_internals.check_worker, 0, 9000)
        found["is none"] = raised_by(tensorflow_internals.check_worker, 1, 9000)

        def wait_for_another():
            tf.raw_ops.CollectiveReduceV2(
                input=1.0,
                group_size=2,
                group_key=77,
                instance_key=5,
                ordering_token=[],
                merge_op="Add",
                final_op="Id",
                timeout_seconds=60,
            )

        tensorflow_internals.abort_collectives(
            tf.errors.UNAVAILABLE, "it has left"
        )
        found["aborted"] = raised_by(wait_for_another)
        print(json.dumps(found))
    """
    return json.loads(last_line_of(script))


def test_a_cluster_waits_as_long_as_it_is_told_first(worker):
    assert worker["milliseconds"] == 10_000
    assert worker["leader"] == "/job:worker/replica:0/task:0"
    assert worker["jobs"] == {"worker": 1}


def test_variables_of_a_worker_begin_with_what_a_function_says(worker):
    assert worker["variable"] == 6.0


def test_texts_are_kept_under_their_keys(worker):
    assert worker["text"] == "grün"
    assert worker["no text"][0] == "DeadlineExceededError"


def test_a_worker_is_known_to_live(worker):
    assert worker["lives"] is None
    # That its number is written as it is looked for.
    assert "/job:worker/replica:0/task:1 not found" in worker["is none"][1]


def test_what_waits_for_others_is_aborted_in_the_words_given(worker):
    name, message = worker["aborted"]
    assert name == "UnavailableError"
    assert "it has left" in message


# --- Functions that are replaced -------------------------------------------


def test_functions_are_where_they_are_replaced():
    for owner, name in (
        *tensorflow_internals.gradient_functions(),
        *tensorflow_internals.storing_functions(),
        tensorflow_internals.TRACED_CALL,
    ):
        assert callable(vars(owner)[name]), name


def test_what_differentiates_stores_and_calls_passes_through_them(monkeypatch):
    called = set()

    def note(name, own, *args, **kwargs):
        called.add(name)
        return own(*args, **kwargs)

    for owner, name in (
        *tensorflow_internals.gradient_functions(),
        *tensorflow_internals.storing_functions(),
        tensorflow_internals.TRACED_CALL,
    ):
        noting = functools.partial(note, name, vars(owner)[name])
        # Of a class it gets its instance too, as no partial does.
        monkeypatch.setattr(owner, name, lambda *a, f=noting, **k: f(*a, **k))

    @tf.custom_gradient
    def tripled(x):
        return 3 * x, lambda upstream: 5 * upstream

    @tf.function(autograph=False)
    def traced(variable):
        with tf.GradientTape() as tape:
            y = tripled(variable)
        return variable.assign_sub(tape.gradient(y, variable))

    variable = tf.Variable(1.0)
    variable.assign(7.0)
    tripled(variable)
    # 7 less the gradient, which is 5.
    assert float(traced(variable)) == 2.0
    assert called == {
        *tensorflow_internals.CUSTOM_GRADIENT_CALLS,
        *("__call__", "assign", "assign_sub", "gradient"),
    }


# --- Traces ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "is_warned"),
    # TensorFlow warns of one code for a while only: ours comes first.
    [(tensorflow_internals.graph_function, False), (tf.function, True)],
)
def test_traces_of_one_code_are_counted_together(make, is_warned, caplog):
    def function_of(number):
        def function(x):
            return x + number

        return make(function)

    # A program that ran before may have made it say less.
    with caplog.at_level(logging.WARNING, logger="tensorflow"):
        sums = [int(function_of(i)(tf.constant(1))) for i in range(7)]
    assert sums == [1, 2, 3, 4, 5, 6, 7]
    assert ("retracing" in caplog.text) == is_warned


def test_what_is_traced_for_xla_is_known():
    def ask(x):
        inner = tf.cond(
            x > 0,
            lambda: tf.constant(tensorflow_internals.is_compiled_by_xla()),
            lambda: tf.constant(False),
        )
        return tf.logical_and(inner, tensorflow_internals.is_compiled_by_xla())

    one = tf.constant(1.0)
    assert not ask(one)
    assert not tf.function(ask)(one)
    assert tf.function(ask, jit_compile=True)(one)
    assert tf.function(tf.function(ask, jit_compile=True))(one)


def test_records_of_custom_gradients_go_with_the_trace_and_no_others():
    @tf.custom_gradient
    def tripled(x):
        return 3 * x, lambda upstream: 5 * upstream

    def gradient(x):
        def body(i, total):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.cond(x > 0, lambda: tripled(x), lambda: x)
            return i + 1, total + tape.gradient(y, x)

        return tf.while_loop(lambda i, _: i < 2, body, [0, 0.0])[1]

    def records():
        found = ops.gradient_registry._registry
        return {name for name in found if name.startswith("CustomGradient-")}

    inner = tf.function(tripled)
    before = records()
    kept = tf.function(lambda x: gradient(inner(x)))
    assert float(kept(tf.constant(1.0))) == 10.0
    of_others = records() - before
    assert len(of_others) >= 2

    @tf.function
    def dropping(x):
        with tensorflow_internals.differentiated_within():
            return gradient(x) + gradient(inner(x))

    assert float(dropping(tf.constant(1.0))) == 20.0
    assert records() == before | of_others
    # That of a function within is there for whoever calls it next.
    with tf.GradientTape() as tape:
        x = tf.constant(1.0)
        tape.watch(x)
        y = inner(x)
    assert float(tape.gradient(y, x)) == 5.0


def test_records_are_dropped_while_garbage_collection_lets_others_add():
    registry = ops.gradient_registry._registry
    record = {"type": lambda: None, "location": ()}
    added, pairs = [], []

    def add(phase, info):
        added.append(f"CustomGradient-of-another-{len(added)}")
        registry[added[-1]] = record

    @tf.function(autograph=False)
    def dropping(x):
        with tensorflow_internals.differentiated_within():
            y = x * 2
            # Python keeps some to use again, whose making collects nothing.
            pairs.extend((i, i) for i in range(10_000))
            gc.callbacks.append(add)
            gc.set_threshold(1)
            return y

    thresholds = gc.get_threshold()
    try:
        assert float(dropping(tf.constant(1.0))) == 2.0
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(add)
        for name in added:
            registry.pop(name, None)
    assert added


def last_line_of(script):
    """What a script prints last, in a process that has done nothing before."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    return result.stdout.splitlines()[-1]
