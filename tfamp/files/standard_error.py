"""What TensorFlow says while it starts, kept for when something fails.

Its C++ code writes to the file descriptor itself, partly before any setting of
the log level is read: on every machine some lines about what it found there.
"""

import importlib.abc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_text: list[str] = []


@contextmanager
def caught() -> Iterator[list[str]]:
    """Keeps what is written to the descriptor; gives it at the end."""
    text: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def start_tensorflow_quietly() -> None:
    """Has the next import of TensorFlow say nothing, unless something fails.

    That import, or later the program: an exception that ends it is preceded
    by what was caught.
    """
    is_set = any(isinstance(each, _Finder) for each in sys.meta_path)
    if "tensorflow" in sys.modules or is_set:
        return
    sys.meta_path.insert(0, _Finder())
    former = sys.excepthook

    def show_and_raise(*error):
        show_caught()
        former(*error)

    sys.excepthook = show_and_raise


def said_at_start() -> str:
    """What was caught of TensorFlow's start."""
    return "".join(_text)


def show_caught() -> None:
    """Writes what was caught to stderr, once."""
    text = "".join(_text)
    _text.clear()
    if text and sys.stderr is not None:
        print(text, end="", file=sys.stderr, flush=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow where it is, once, and loads it quietly."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None):
        if fullname != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks for the module's files later asks the loader itself.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        try:
            with caught() as text:
                self._loader.exec_module(module)
                # Drivers that are not there are looked for at the first use.
                module.config.list_physical_devices()
        except BaseException:
            _text.extend(text)
            show_caught()
            raise
        _text.extend(text)
