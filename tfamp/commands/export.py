"""`tfamp export`: a trained recipe as files that were run, and their metric."""

import argparse
from typing import Any

from tfamp.commands import json_flag, recipe_argument, trained_argument
from tfamp.errors import InputError, did_you_mean
from tfamp.files import console

# Repeated here: the parser imports neither Keras nor TensorFlow.
_FORMATS = ("saved_model", "litert", "onnx", "keras")
_KINDS = ("float16", "int8", "int8-static", "int4", "gptq")


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "export",
        help="files for other runtimes, run and compared, also quantized",
        description="Exports a recipe's model, loads and runs each file in its "
        "own runtime, and tests whether its metric is as good as in float32. "
        "Exit status 1 where a file could not be written, or its metric is not "
        "shown to be within the margin.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    trained_argument.add_to(parser)
    parser.add_argument(
        "--formats",
        default="saved_model",
        help=f"a comma list of {', '.join(_FORMATS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help="that is traced (default: %(default)s); the recipe's own is "
        "--config.precision",
    )
    parser.add_argument(
        "--quantize",
        default="",
        help=f"also as {', '.join(_KINDS)}, a comma list",
    )
    parser.add_argument(
        "--keep",
        default="",
        help="layers that are not quantized, a comma list; auto: the fewest of "
        "the most sensitive ones with which the metric stays",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="the largest difference to float32, relative to the largest "
        "output (default: 1e-4 in float32)",
    )
    parser.add_argument(
        "--part",
        default="",
        help="an attribute of the model that is exported instead, such as the "
        "generator of a GAN",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for the files, export.json and report.html",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    formats = _list("--formats", args.formats, _FORMATS)
    kinds = _list("--quantize", args.quantize, _KINDS)
    trained_argument.check(args)

    from tfamp.analysis.exported import part, tables
    from tfamp.analysis.report import write
    from tfamp.files.output import make_folder, output_folder, write_json
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()

    folder = output_folder(args.output_dir)
    recipe, config = recipe_argument.load(args, "output_dir")
    recipe_argument.require_data(args, config)
    make_folder(folder)
    with console.aside(args.json):
        record = _measured(args, recipe, config, formats, kinds, folder)
        write_json(folder / "export.json", record)
        page = write.write(folder)
    console.print_report(
        args.json,
        record,
        *map(console.filled, tables.tables(record)),
        *part.notes(record),
        part.verdict(record),
        f"The report: {page}",
    )
    return 0 if record["passed"] else 1


def _measured(args, recipe, config, formats, kinds, folder) -> dict[str, Any]:
    """The record of the files, which are in the folder then."""
    from tfamp.analysis.exported import measure

    subject = trained_argument.open_trained(args, recipe, config)
    model = subject.model
    if args.part:
        model = getattr(model, args.part, None)
        if not hasattr(model, "layers"):
            raise InputError(
                f"--part={args.part} is no model that is part of the recipe's."
            )
    question = measure.Question(
        formats=formats,
        precision=args.precision,
        kinds=kinds,
        metric=args.metric,
        margin=args.margin,
        alpha=args.alpha,
        tolerance=args.tolerance,
        keep=None
        if args.keep == "auto"
        else [each.strip() for each in args.keep.split(",") if each.strip()],
        order=_order(subject, args) if args.keep == "auto" else (),
    )
    return {
        **measure.measure(
            model,
            trained_argument.inputs_of_part(subject, args.part),
            trained_argument.inputs_of_part(subject, args.part, "train"),
            folder,
            question,
            steps=args.steps,
            say=lambda text: print(text, flush=True),
        ),
        **trained_argument.described(args),
    }


def _order(subject, args: argparse.Namespace) -> list[str]:
    """The layers by how far they alone move the gradient, the worst first."""
    from tfamp.analysis.tune.measure import tune

    if args.part:
        raise InputError("--keep=auto needs the whole model; leave out --part.")
    print("measuring how sensitive each layer is", flush=True)
    scores = tune(
        subject.model, subject.train_batches, steps=2, precision="auto"
    ).scores
    return sorted(scores, key=lambda path: -scores[path])


def _list(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise InputError(
                f"{flag}={text}: unknown {name!r}; expected "
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"{flag}={text} names one twice.")
    return names
