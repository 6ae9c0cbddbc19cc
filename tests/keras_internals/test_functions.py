"""The functions that are replaced are where they are looked for."""

from tfamp import keras_internals


def test_the_functions_behind_keras_ops_are_where_they_are_replaced():
    modules = keras_internals.backend_modules()
    for name in ("exp", "softmax", "logsumexp", "norm", "cast", "dropout"):
        assert any(callable(vars(each).get(name)) for each in modules), name
    for owner, name in (
        *keras_internals.casts_of_keras(),
        *keras_internals.casts_of_users(),
        *keras_internals.applying_functions(),
    ):
        assert callable(vars(owner)[name]), name
