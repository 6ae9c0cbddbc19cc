"""Seeds and marks of a session are found, and go with it."""

import keras

from tfamp import keras_internals


def test_the_global_seed_generator_is_what_unseeded_draws_use():
    keras.utils.set_random_seed(1)
    assert keras_internals.global_seed_generator(create=False) is None
    keras.random.normal((1,))
    generator = keras_internals.global_seed_generator(create=False)
    before = generator.state.numpy()
    keras.random.normal((1,))
    assert (generator.state.numpy() != before).any()
    assert keras_internals.global_seed_generator(create=True) is generator


def test_a_forgotten_global_seed_generator_is_made_anew():
    keras.random.normal((1,))
    assert keras_internals.global_seed_generator(create=False) is not None
    keras_internals.forget_global_seed_generator()
    assert keras_internals.global_seed_generator(create=False) is None


def test_a_session_loses_its_mark_when_it_is_cleared():
    keras_internals.mark_session("here")
    assert keras_internals.session_mark() == "here"
    keras.backend.clear_session()
    assert keras_internals.session_mark() is None
