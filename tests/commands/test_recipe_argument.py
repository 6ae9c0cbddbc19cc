"""`--config.FIELD=VALUE`, for every command that takes a recipe."""

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
    args = parser.parse_args(rest)
    recipe_argument.attach_settings(args, settings)
    return args


def test_settings_stand_anywhere_and_become_fields():
    args = parse("--config.batch_size=32", RECIPE, "--config.dataset=a=b")
    recipe, config = recipe_argument.load(args)
    assert recipe.Config is type(config)
    assert (config.batch_size, config.dataset) == (32, "a=b")


@pytest.mark.parametrize("argument", ["--config.seed", "--config.=3"])
def test_a_setting_without_a_field_or_value_is_refused(argument):
    with pytest.raises(tfamp.InputError, match=r"--config\.FIELD=VALUE"):
        split_settings([RECIPE, argument])


def test_a_field_that_the_command_sets_itself_is_refused():
    args = parse(RECIPE, "--config.precision=float32")
    with pytest.raises(tfamp.InputError, match="set by the command itself"):
        recipe_argument.load(args, "seed", "precision")


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(tfamp.InputError, match="batch_size"):
        recipe_argument.load(parse(RECIPE, "--config.batchsize=3"))


def test_a_command_without_a_recipe_takes_no_setting(capsys):
    assert cli.main(["formats", "--config.seed=1"]) == 2
    assert "takes a recipe" in capsys.readouterr().err
