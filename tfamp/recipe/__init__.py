"""A recipe as a program: what `tfamp.recipe` gives to recipes.

`program` says what a recipe is.
"""

from tfamp.recipe.flags import configure, flag
from tfamp.recipe.program import (
    RECIPE_FIELDS,
    RECIPE_NAMES,
    describe_exit,
    load_recipe,
    main,
    quiet_tensorflow,
    report_exit,
    shipped_recipes,
)
from tfamp.recipe.run_config import (
    RunConfig,
    final_metrics,
    fit,
    print_float32_layers,
    run_callbacks,
    start,
)

__all__ = [
    "RECIPE_FIELDS",
    "RECIPE_NAMES",
    "RunConfig",
    "configure",
    "describe_exit",
    "final_metrics",
    "fit",
    "flag",
    "load_recipe",
    "main",
    "print_float32_layers",
    "quiet_tensorflow",
    "report_exit",
    "run_callbacks",
    "shipped_recipes",
    "start",
]
