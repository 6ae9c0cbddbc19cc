"""The trained weights that a command works on, and how it judges."""

import argparse
from typing import Any

from tfamp.commands import margin_flags, recipe_argument
from tfamp.errors import InputError


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declares the checkpoint, and the test of the metric."""
    parser.add_argument(
        "--checkpoint",
        default="",
        help="a .keras or .weights.h5 file, or the checkpoint_dir of a "
        "training; without it the weights are those that the recipe begins "
        "with",
    )
    parser.add_argument(
        "--metric",
        help="of the model's (default: an accuracy, or else the loss)",
    )
    margin_flags.add_to(parser)
    parser.add_argument(
        "--steps",
        type=int,
        help="batches to evaluate on at most (default: all)",
    )


def check(args: argparse.Namespace) -> None:
    """Checks what can be checked before anything is loaded.

    Raises:
        InputError: for a margin, alpha or steps that cannot be used, or where
            scipy or matplotlib is missing.
    """
    from tfamp.analysis.page import plots
    from tfamp.analysis.parity.equivalence import check_test, require_scipy

    check_test(args.margin, args.alpha)
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps={args.steps} must be at least 1.")
    plots.require_matplotlib()
    require_scipy()


def open_trained(args: argparse.Namespace, recipe: Any, config: Any) -> Any:
    """The recipe's model, with the weights of the checkpoint, and its data."""
    from tfamp.recipe.subject import open_subject
    from tfamp.saving import trained

    subject = open_subject(recipe, config)
    if args.checkpoint:
        trained.restore(
            subject.model, args.checkpoint, subject.train_batches.element_spec
        )
    elif not recipe_argument.is_saved_model(args):
        print("no --checkpoint: the weights are not trained", flush=True)
    return subject


def inputs_of_part(subject: Any, part: str, which: str = "eval") -> Any:
    """The data to run a model, or a part of it, on.

    A part takes what of a batch fits the shape of its inputs.
    """
    batches = getattr(subject, f"{which}_batches")
    if not part:
        return batches
    import keras

    expected = getattr(subject.model, part).inputs

    def of_part(*element):
        found = []
        leaves = keras.tree.flatten(element)
        for tensor in expected:
            fitting = [
                leaf
                for leaf in leaves
                if leaf.shape[1:].as_list() == list(tensor.shape[1:])
            ]
            if not fitting:
                raise InputError(
                    f"No part of a batch has the shape {tensor.shape} that "
                    f"{part!r} takes."
                )
            found.append(fitting[0])
        return found[0] if len(found) == 1 else found

    return batches.map(of_part)


def described(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of where its figures come from."""
    from tfamp.analysis.page import environment

    return {
        "recipe": args.recipe,
        "settings": dict(args.settings),
        "checkpoint": args.checkpoint or None,
        "environment": environment.describe(),
    }
