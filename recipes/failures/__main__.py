"""The program: `python -m recipes.failures --failure=NAME`."""

import tfamp
from recipes.failures import Config
from recipes.failures.contrast import main

if __name__ == "__main__":
    tfamp.recipe.main(main, Config)
