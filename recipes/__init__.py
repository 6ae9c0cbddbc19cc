"""Programs that train: `python -m recipes.NAME --help`."""

import os

from tfamp.files.standard_error import start_tensorflow_quietly

# TensorFlow reads this once, when it is imported, and this is the only place
# that runs before. Warnings and errors still show; what it says while it
# starts, where something fails.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
start_tensorflow_quietly()
