"""A config dataclass from text: as flags, or as `FIELD=VALUE` settings.

Fields are annotated with int, float, bool, str, `Literal[...]`,
`tuple[T, ...]` of these, or `T | None`. One parser serves a recipe's flags
and the `--config.FIELD=VALUE` of the commands.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from tfamp.errors import InputError, did_you_mean

SETTING_PREFIX = "--config."


def flag(
    default: Any,
    help: str,
    *,
    minimum: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A field of `Config` with its default and its line in `--help`.

    Args:
        default: what it is where nobody says otherwise.
        help: what the field means, and in which unit.
        minimum: the least number that is allowed.
        below: numbers must be less than it.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "minimum": minimum, "below": below},
    )


def check_ranges(config: Any) -> None:
    """Checks the numbers of a config made of `flag` fields.

    Raises:
        InputError: one is out of its range, or NaN.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low = field.metadata.get("minimum", -math.inf)
        high = field.metadata.get("below", math.inf)
        if not low <= value < high:
            raise InputError(
                f"{field.name}={value} is out of range; expected a number in "
                f"[{low}, {high})."
            )


def split_settings(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes the `--config.FIELD=VALUE` out of a command line.

    Returns:
        Field and text of each, and the other arguments.

    Raises:
        InputError: one has no `=VALUE`.
    """
    settings, others = {}, []
    for argument in argv:
        if not argument.startswith(SETTING_PREFIX):
            others.append(argument)
            continue
        name, equals, text = argument.removeprefix(SETTING_PREFIX).partition(
            "="
        )
        if not (name and equals):
            raise InputError(
                f"{argument!r} sets nothing; expected --config.FIELD=VALUE."
            )
        settings[name] = text
    return settings, others


def parse_flags(
    config_class: type, arguments: Sequence[str]
) -> tuple[str, Any]:
    """Makes a config from a program's arguments.

    The flags live in an absl `FlagValues` of their own: global ones would
    collide when two recipes are used in one process.

    Args:
        config_class: The dataclass.
        arguments: The command line without the program's name.

    Returns:
        What `--help` says about the flags, and the config; None in its place
        where `--help` was among the arguments.

    Raises:
        InputError: An unknown flag, a value that its field does not allow, or
            an argument that is no flag.
    """
    hints = _field_types(config_class)
    values = flags.FlagValues()
    flags.DEFINE_boolean(
        "help", False, "show this and exit", values, "flags", short_name="h"
    )
    for field in dataclasses.fields(config_class):
        _define_flag(field, hints[field.name], values)
    try:
        _, *unexpected = values(["program", *arguments])
    except flags.UnrecognizedFlagError as error:
        raise InputError(
            f"Unknown flag --{error.flagname}."
            f"{did_you_mean(error.flagname, hints, '--')} "
            "--help lists all flags."
        ) from None
    except (flags.Error, ValueError) as error:
        raise InputError(f"{error}.") from None
    help_text = values.get_help(include_special_flags=False).strip()
    if values["help"].value:
        return help_text, None
    if unexpected:
        raise InputError(
            f"Unexpected argument {unexpected[0]!r}; flags are written "
            "--FLAG=VALUE."
        )
    given = {name: values[name] for name in hints if values[name].present}
    return help_text, _construct(
        config_class, {name: flag.value for name, flag in given.items()}
    )


def configure(
    config_class: type, settings: Mapping[str, str], others: Iterable[str] = ()
) -> Any:
    """Makes a config from `{"field": "value as on the command line"}`.

    Args:
        config_class: the dataclass.
        settings: field and text.
        others: names that stand beside the fields, to suggest for a slip.

    Raises:
        InputError: An unknown field, or text that its type does not allow.
    """
    hints = _field_types(config_class)
    values = {}
    for name, text in settings.items():
        if name not in hints:
            raise InputError(
                f"Unknown flag --{name}."
                f"{did_you_mean(name, [*hints, *others], '--')} "
                f"The recipe's are {', '.join(hints)}."
            )
        try:
            values[name] = parse_value(text, hints[name])
        except ValueError as error:
            raise InputError(f"--{name}={text}: {error}.") from None
    return _construct(config_class, values)


def check_not_reserved(
    settings: Mapping[str, str],
    reserved: Iterable[str],
    flags_of_command: Iterable[str] = (),
) -> None:
    """Checks that none is set of the fields that a command sets itself.

    Args:
        settings: field and text.
        reserved: the fields.
        flags_of_command: where --NAMEs is among them, it is what to use.

    Raises:
        InputError: one is set.
    """
    for name in reserved:
        if name in settings:
            instead = (
                f"use --{name}s=..., or leave it out"
                if f"{name}s" in flags_of_command
                else "leave it out"
            )
            raise InputError(
                f"--{name}={settings[name]}: this command sets the recipe's "
                f"{name} itself; {instead}."
            )


def parse_value(text: str, hint: Any) -> Any:
    """Turns a command line's text into a value of the annotated type.

    Args:
        text: Numbers, `true`/`false`, a choice, or a comma list for a tuple;
            `none` for the None of an optional type.
        hint: int, float, bool, str, `Literal[...]`, `tuple[T, ...]` of
            these, or `T | None`.

    Raises:
        ValueError: The text does not fit; the message says what does.
        TypeError: A recipe annotated a field with a type not listed above.
    """
    expected = _expected(hint)
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    try:
        if hint in _SCALARS:
            return _SCALARS[hint][1](text)
        if kind is typing.Literal:
            return {str(choice): choice for choice in arguments}[text]
        if kind is tuple:
            items = text.split(",") if text else ()
            return tuple(parse_value(i.strip(), arguments[0]) for i in items)
        if text.lower() == "none":
            return None
        return parse_value(text, _without_none(hint))
    except (KeyError, ValueError):
        raise ValueError(f"expected {expected}") from None


def _parse_bool(text):
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


# Type -> what its text looks like, and how to read it.
_SCALARS: dict[type, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _parse_bool),
    float: ("a number", float),
    int: ("an integer", int),
    str: ("text", str),
}


class _FieldParser(flags.ArgumentParser):
    """`parse_value` in the shape that absl asks for."""

    def __init__(self, hint):
        super().__init__()
        self._hint = hint
        self.syntactic_help = _expected(hint)

    def parse(self, argument):
        # absl also passes the default through here, which is a value already.
        is_text = isinstance(argument, str)
        return parse_value(argument, self._hint) if is_text else argument

    def flag_type(self):
        return self.syntactic_help


def _define_flag(field, hint, values):
    is_tuple = typing.get_origin(_without_none(hint)) is tuple
    flags.DEFINE_flag(
        flags.Flag(
            parser=_FieldParser(hint),
            serializer=flags.ListSerializer(",") if is_tuple else None,
            name=field.name,
            default=_default(field),
            help_string=field.metadata.get("help", " "),
            boolean=_without_none(hint) is bool,
            # Only this module reads `values`, and by subscript.
            allow_using_method_names=True,
        ),
        values,
        module_name="flags",
    )


def _expected(hint):
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint][0]
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if kind is tuple and len(arguments) == 2 and arguments[1] is ...:
        return f"a comma list, each item {_expected(arguments[0])}"
    if _without_none(hint) is not hint:
        return f"{_expected(_without_none(hint))}, or none"
    raise TypeError(
        f"A config field cannot have the type {hint}; expected int, float, "
        "bool, str, Literal[...], tuple[T, ...], or T | None."
    )


def _without_none(hint):
    """`T` of `T | None`; any other type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(others) == 1:
            return others[0]
    return hint


def _field_types(config_class):
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def _default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _construct(config_class, values):
    for field in dataclasses.fields(config_class):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise InputError(f"{field.name} must be given; it has no default.")
    return config_class(**values)
