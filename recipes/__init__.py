"""Programs that train: `python -m recipes.NAME --help`."""

import os

# TensorFlow reads this once, when it is imported, and this is the only place
# that runs before. Warnings and errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
