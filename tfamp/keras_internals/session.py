"""What a session remembers: its seeds, and marks that something was done."""

from typing import Any, Literal, overload

import keras

# Keras has a name for it since 3.13.
_GLOBAL_SEED_GENERATOR = "global_seed_generator"


@overload
def global_seed_generator(
    create: Literal[True],
) -> keras.random.SeedGenerator: ...


@overload
def global_seed_generator(
    create: bool,
) -> keras.random.SeedGenerator | None: ...


def global_seed_generator(create: bool) -> keras.random.SeedGenerator | None:
    """What `keras.random` draws from without a seed.

    Args:
        create: whether to make it where nothing has drawn from it yet; else
            the result is None there.
    """
    if create:
        return keras.src.random.seed_generator.global_seed_generator()
    return keras.src.backend.common.global_state.get_global_attribute(
        _GLOBAL_SEED_GENERATOR
    )


def forget_global_seed_generator() -> None:
    """Undoes its making: the next draw without a seed makes it anew."""
    keras.src.backend.common.global_state.set_global_attribute(
        _GLOBAL_SEED_GENERATOR, None
    )


def seed_dtype() -> str:
    """The dtype of what `keras.random` draws from."""
    return keras.src.backend.random_seed_dtype()


def is_saving_model() -> bool:
    """Whether a model's config is being written into a file."""
    attribute = "shared_objects/id_to_obj_map"
    state = keras.src.backend.common.global_state
    return state.get_global_attribute(attribute) is not None


def mark_session(value: Any) -> None:
    """Leaves a mark that `keras.backend.clear_session()` wipes off."""
    keras.src.backend.common.global_state.set_global_attribute(
        "tfamp_mark", value
    )


def session_mark() -> Any:
    """The mark that `mark_session` left, or None."""
    return keras.src.backend.common.global_state.get_global_attribute(
        "tfamp_mark"
    )


def mark(model: keras.Model, name: str) -> None:
    """Notes on a model that something was done; no file keeps the note."""
    object.__setattr__(model, f"_{name}", True)


def is_marked(model: keras.Model, name: str) -> bool:
    """Whether `mark` noted that."""
    return getattr(model, f"_{name}", False)
