"""What crosses between the replicas of a strategy, and what must arrive.

In one graph, so that a job of several workers runs all of it at one start.
"""

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from tfamp.distribute import reduction

ROWS = 6
MANY_ROWS = 2**17
MIXES = {
    "one": ("bfloat16",),
    "two": ("bfloat16", "float32"),
    "int32": ("int32", "int32"),
    "all": (
        *("float32", "int8", "bfloat16", "bool", "int64", "float16"),
        *("float64", "int32"),
    ),
}
# Each choice is traced once a replica, and each sparse tensor takes its time.
SPARSE = 4
# Of these the graph does not know how many rows cross; a small one does whole.
TABLES = [
    (rows, name)
    for rows in (ROWS, MANY_ROWS)
    for name in ("float32", "bfloat16")
]
CHOICES = {
    "one": (("dense", None), ("sparse", None), ("both", "bfloat16")),
    "two": (("dense", "bfloat16"), ("both", "float16")),
    "int32": (("both", None),),
    "all": (("both", None),),
}
# Not of each dtype the same, and of odd lengths: bits are packed.
SHAPES = ((3,), (), (1, 5), (2, 2), (0,))
# A NaN with a message in it, a zero with a sign, a subnormal.
BITS = np.array([0x7FA1, 0x8000, 0x0001, 0xFF80, 0x3F80], np.uint16)


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def values_of(replica, name, shape):
    """Replica r's: 1, -2, 3, -4 ... times r + 1; true where that is 3."""
    count = int(np.prod(shape, dtype=int))
    signs = np.where(np.arange(count) % 2, -1, 1)
    values = (np.arange(count) + 1) * signs * (replica + 1)
    values = values == 3 if name == "bool" else values
    return values.reshape(shape).astype(numpy_dtype(name))


def rows_of(replica, name):
    """Rows 0 and r + 1, and for the first replica only row 0."""
    indices = [0, replica + 1][: 1 + min(replica, 1)]
    return values_of(replica, name, (len(indices), 3)), np.array(indices)


def crossed(strategy):
    """By name: the bytes of what each local replica got, as uint8."""

    def tensor(replica, name, shape):
        every = np.stack(
            [
                values_of(r, name, shape)
                for r in range(strategy.num_replicas_in_sync)
            ]
        )
        return tf.gather(tf.constant(every), replica)

    def slices(replica, name, rows=ROWS, none=0):
        mine = tensor(replica, name, (2, 3))
        used = 1 + tf.minimum(replica, 1) + none
        indices = tf.stack([0, replica + 1])
        return tf.IndexedSlices(
            mine[:used], indices[:used], tf.constant([rows, 3])
        )

    def on_replica():
        context = tf.distribute.get_replica_context()
        replica = tf.convert_to_tensor(context.replica_id_in_sync_group)
        got = {}
        for mix, names in MIXES.items():
            dense = [
                tensor(replica, name, SHAPES[i % len(SHAPES)])
                for i, name in enumerate(names)
            ]
            sparse = [slices(replica, name) for name in names[:SPARSE]]
            for kind, dtype in CHOICES[mix]:
                values = {"dense": dense, "sparse": sparse}.get(
                    kind, [*sparse, *dense]
                )
                got[f"sum/{kind}/{mix}/{dtype}"] = reduction.sum_over_replicas(
                    values, dtype
                )
            got[f"gather/{mix}"] = reduction.gather(dense)
            got[f"broadcast/{mix}"] = reduction.broadcast(dense)
            got[f"maximum/{mix}"] = reduction.maximum(dense)
        bits = tf.bitcast(tf.constant(BITS), tf.bfloat16)
        bits = tf.where(replica == 0, bits, tf.ones_like(bits))
        got["bits"] = reduction.broadcast([bits])
        turned = tf.bitcast(tf.constant(BITS[::-1]), tf.bfloat16)
        half = tf.where(replica == 0, bits, turned)
        got["bits_of_all"] = reduction.gather([half])
        mine = tf.cast(replica, tf.float32)
        got["mean"] = reduction.mean(
            [
                tf.stack([1.0, -0.0, np.inf, mine]),
                tf.cast(tf.stack([mine, 3.0]), tf.bfloat16),
            ]
        )
        # Known when the graph runs.
        none = tf.random.uniform([], 0, 1, tf.int32)
        got["rows"] = reduction.sum_over_replicas(
            [slices(replica, name, rows, none) for rows, name in TABLES]
        )
        # Of lengths that are known in the graph alone.
        anew = tf.range(tf.random.uniform([], 3, 4, tf.int32))
        got["unknown"] = reduction.gather(
            [tf.cast(anew, tf.int8), tf.cast(anew + replica, tf.float32)]
        )
        return got

    @tf.function(autograph=False)
    def everywhere():
        return strategy.run(on_replica)

    results = {}
    for name, values in everywhere().items():
        for i, value in enumerate(values):
            for r, mine in enumerate(
                strategy.experimental_local_results(value)
            ):
                results |= _described(f"{name}/{i}/{r}", mine)
    return results


def variables(strategy):
    """Each replica's of variables that begin with numbers drawn by a worker."""
    results = {}
    seed = getattr(strategy.cluster_resolver, "task_id", 0)
    for name in ("bfloat16", "int8", "float16", "bool", "uint8", "float32"):
        drawn = np.random.default_rng(seed).integers(0, 2, (3, 5))
        with strategy.scope():
            variable = keras.Variable(
                lambda shape, dtype, drawn=drawn: tf.cast(drawn, dtype),
                shape=(3, 5),
                dtype=name,
                trainable=False,
            )
        for r, value in enumerate(
            strategy.experimental_local_results(variable.value)
        ):
            results |= _described(f"variable/{name}/{r}", value)
    return results


def _described(name, value):
    if isinstance(value, tf.IndexedSlices):
        return _described(f"{name}/values", value.values) | {
            f"{name}/indices": value.indices.numpy()
        }
    value = value.numpy() if hasattr(value, "numpy") else value
    return {
        name: np.frombuffer(value.tobytes(), np.uint8),
        f"{name}/dtype": np.array(value.dtype.name),
        f"{name}/shape": np.array(value.shape),
    }


def read(results, name):
    """The array whose bytes were kept."""
    dtype = numpy_dtype(str(results[f"{name}/dtype"]))
    value = np.frombuffer(results[name].tobytes(), dtype)
    return value.reshape(results[f"{name}/shape"])


def check(results, replicas, local):
    """Compares all that `crossed` gave with numbers written down by NumPy."""
    for r in range(local):
        for mix, names in MIXES.items():
            _check_sums(results, mix, names, replicas, r)
            for i, name in enumerate(names):
                shape = SHAPES[i % len(SHAPES)]
                every = np.stack(
                    [values_of(k, name, shape) for k in range(replicas)]
                )
                for what, expected in (
                    ("gather", every),
                    ("broadcast", every[0]),
                    ("maximum", every.max(axis=0)),
                ):
                    value = read(results, f"{what}/{mix}/{i}/{r}")
                    assert value.dtype == every.dtype
                    np.testing.assert_array_equal(value, expected)
        first = read(results, f"bits/0/{r}").view(np.uint16)
        np.testing.assert_array_equal(first, BITS)
        every = read(results, f"bits_of_all/0/{r}").view(np.uint16)
        np.testing.assert_array_equal(every[0], BITS)
        last = BITS if replicas == 1 else BITS[::-1]
        np.testing.assert_array_equal(every[-1], last)
        mean = (replicas - 1) / 2
        means = read(results, f"mean/0/{r}")
        np.testing.assert_array_equal(means, [1.0, -0.0, np.inf, mean])
        assert np.signbit(means[1])
        np.testing.assert_array_equal(
            read(results, f"mean/1/{r}").astype("float64"), [mean, 3.0]
        )
        for i, (rows, name) in enumerate(TABLES):
            is_whole = rows == ROWS and replicas > 1
            _check_rows(results, f"rows/{i}/{r}", name, replicas, is_whole)
        first, second = (read(results, f"unknown/{i}/{r}") for i in (0, 1))
        np.testing.assert_array_equal(first, [[0, 1, 2]] * replicas)
        np.testing.assert_array_equal(
            second, [[k, k + 1, k + 2] for k in range(replicas)]
        )


def _check_sums(results, mix, names, replicas, r):
    # 1 + 2 + ... : small enough for each dtype to hold.
    factor = replicas * (replicas + 1) // 2
    for kind, dtype in CHOICES[mix]:
        at = f"sum/{kind}/{mix}/{dtype}"
        number = 0
        for name in names[:SPARSE] * (kind != "dense"):
            _check_rows(results, f"{at}/{number}/{r}", name, replicas)
            number += 1
        for i, name in enumerate(names * (kind != "sparse")):
            shape = SHAPES[i % len(SHAPES)]
            expected = values_of(0, name, shape) * factor
            if name == "bool":
                every = [values_of(k, name, shape) for k in range(replicas)]
                expected = np.any(every, axis=0)
            value = read(results, f"{at}/{number}/{r}")
            number += 1
            assert value.dtype == numpy_dtype(name)
            np.testing.assert_array_equal(value, expected)


def _check_rows(results, at, name, replicas, is_whole=False):
    every = [rows_of(k, name) for k in range(replicas)]
    expected, indices = map(np.concatenate, zip(*every, strict=True))
    if is_whole:
        table = np.zeros((ROWS, 3))
        np.add.at(table, indices, expected)
        indices = np.unique(indices)
        expected = table[indices]
    value = read(results, f"{at}/values")
    assert value.dtype == numpy_dtype(name)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(results[f"{at}/indices"], indices)
