"""The flags of a recipe, for every command that takes one."""

import argparse

import pytest

import tfamp
from tfamp import cli
from tfamp.commands import recipe_argument
from tfamp.recipe.flags import split_settings

RECIPE = "recipes.image_classification"


def parse(*argv):
    settings, rest = split_settings(argv)
    parser = argparse.ArgumentParser()
    recipe_argument.add_to(parser)
    args, others = parser.parse_known_args(rest)
    recipe_argument.attach_settings(args, settings, others)
    return args


def test_settings_stand_anywhere_and_become_fields():
    args = parse("--config.batch_size=32", RECIPE, "--config.dataset=a=b")
    recipe, config = recipe_argument.load(args)
    assert recipe.Config is type(config)
    assert (config.batch_size, config.dataset) == (32, "a=b")


def test_flags_are_written_as_when_the_recipe_is_run():
    args = parse(RECIPE, "--batch_size=32", "--seed", "7", "--config.epochs=2")
    _, config = recipe_argument.load(args)
    assert (config.batch_size, config.seed, config.epochs) == (32, 7, 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lint", RECIPE, "--batchsize=32"], "Did you mean --batch_size?"),
        (["lint", RECIPE, "--srif=x"], "Did you mean --sarif?"),
        (["lint", RECIPE, "--epochs=three"], "--epochs=three: expected an int"),
        (["lint", RECIPE, "epochs=3"], "flags are written --FLAG=VALUE"),
        (
            ["formats", "--scal=2"],
            "--scal=2; see `tfamp --help`. Did you mean ",
        ),
        (["benhc", RECIPE], "Did you mean bench?"),
        (["lint", RECIPE, "--precision=float16"], "mean mixed_float16?"),
        (["lint", RECIPE, "--precision=BF16"], "mean mixed_bfloat16?"),
        (["lint", RECIPE, "--strategy=miror"], "mean mirrored?"),
        (
            ["probe", RECIPE, "--precision=fp16", "--output_dir=x"],
            "--precision=fp16: this command sets the recipe's precision",
        ),
        (["doctor", "--assume=H10"], "mean H100?"),
        (["lint", "recipes.image_clasification"], "recipes.image_classificati"),
        (["lint", "language_model"], "Did you mean recipes.language_model?"),
        (["bench", RECIPE, "--output_dir=x", "--precisions=fp17"], "fp17"),
    ],
)
def test_a_slip_is_one_line_with_what_was_meant(argv, words, capsys):
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_names_of_other_libraries_are_understood():
    parser = argparse.ArgumentParser()
    recipe_argument.add_precisions_to(parser)
    args = parser.parse_args(["--precisions=fp32,bf16-mixed, 16-mixed"])
    assert args.precisions == ("float32", "mixed_bfloat16", "mixed_float16")


@pytest.mark.parametrize("argument", ["--config.seed", "--config.=3"])
def test_a_setting_without_a_field_or_value_is_refused(argument):
    with pytest.raises(tfamp.InputError, match=r"--config\.FIELD=VALUE"):
        split_settings([RECIPE, argument])


def test_a_field_that_the_command_sets_itself_is_refused():
    args = parse(RECIPE, "--config.precision=float32")
    with pytest.raises(tfamp.InputError, match="sets the recipe's precision"):
        recipe_argument.load(args, "seed", "precision")


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(tfamp.InputError, match="batch_size"):
        recipe_argument.load(parse(RECIPE, "--config.batchsize=3"))


def test_a_command_without_a_recipe_takes_no_setting(capsys):
    assert cli.main(["formats", "--config.seed=1"]) == 2
    assert "takes a recipe" in capsys.readouterr().err
