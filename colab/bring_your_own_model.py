# %% [markdown]
# # Your own model in 16 bits
#
# - **What you will see:** your Keras model and your data in `tfamp.fit`; what
#   `lint` and `probe` say of them; whether 16 bits reach what 32 do (`parity`),
#   and how much faster they are (`bench`), on one page that you can keep. Until
#   you put in your own, a small network tells three spirals apart.
# - **How long it takes:** two minutes on two CPU cores, as it stands.
# - **Which runtime:** GPU (not run there by us). On a CPU everything runs, but
#   its speed says little. A TPU serves one process at a time, and `parity` and
#   `bench` start others.

# %%
# %matplotlib inline
import contextlib
import html
import inspect
import pathlib
import sys
import tempfile

import tensorflow as tf
from IPython.display import HTML, Code, Image, display

import tfamp
from tfamp import cli
from tfamp.analysis.page import plots
from tfamp.analysis.report import write
from tfamp.recipe.subject import open_subject

ON_ACCELERATOR = tfamp.detect_hardware().kind != "cpu"
EPOCHS = 20 if ON_ACCELERATOR else 3
SEEDS = 5 if ON_ACCELERATOR else 2
ROUNDS = 5 if ON_ACCELERATOR else 1

# What suits this device; where that is float32, bfloat16 to see how it goes.
PRECISION = tfamp.recommend().precision
if PRECISION == "float32":
    PRECISION = "mixed_bfloat16"

# TensorFlow takes all memory of a GPU, unless told not to: parity and bench
# train in processes of their own.
for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)


def command(*arguments):
    """`tfamp ARGUMENTS`, as in a shell; its progress among its output."""
    with contextlib.redirect_stderr(sys.stdout):
        cli.main(arguments)


# %% [markdown]
# ## Your file
#
# `tfamp new` writes a recipe: a Python file that runs at once. Put your own in
# three places, then run all cells below again:
#
# 1. flags into `Config` (you may have none),
# 2. your data into `make_datasets`: a `tf.data.Dataset` of batches,
# 3. your network into `build_model`: any Keras model, compiled.
#
# On Colab the file opens at the right. It lies in `/content`, which goes with
# the runtime: download it when it is yours.

# %%
CONTENT = pathlib.Path("/content")
folder = CONTENT if CONTENT.is_dir() else pathlib.Path(tempfile.mkdtemp())
recipe_file = folder / "my_model.py"
if not recipe_file.exists():
    command("new", str(recipe_file))
try:
    from google.colab import files
except ImportError:
    print(f"Open {recipe_file} in an editor.")
else:
    files.view(str(recipe_file))

# %% [markdown]
# ## Train it
#
# The cell reads the file anew, and builds model and data as `train` would.

# %%
recipe = tfamp.recipe.load_recipe(str(recipe_file))
config = recipe.Config(precision=PRECISION, epochs=EPOCHS)
subject = open_subject(recipe, config)
model, train_batches = subject.model, subject.train_batches
results = pathlib.Path(tempfile.mkdtemp(prefix="results_"))
model.summary()

# %% [markdown]
# Three calls in `build_model` make a Keras model one of mixed precision:
# `keep_float32` after the last layer, `wrap_optimizer` around the optimizer,
# and `auto_scale_loss=False`, because the optimizer scales the loss now. (In a
# notebook without a recipe, `tfamp.set_precision("auto")` comes before.)

# %%
display(Code(inspect.getsource(recipe.build_model), language="python"))

# %%
history = tfamp.fit(
    model,
    train_batches,
    epochs=config.epochs,
    validation_data=subject.eval_batches,
)

# %%
figure = plots.new_figure(plots.NARROW, 3.0)
axes = figure.subplots()
for name, style in (("loss", "o-"), ("val_loss", "o--")):
    losses = history.history[name]
    epochs = range(1, len(losses) + 1)
    color = plots.COLORS[PRECISION]
    axes.plot(epochs, losses, style, ms=4, color=color, label=name)
axes.xaxis.get_major_locator().set_params(integer=True)
axes.set(xlabel="epoch", ylabel="loss", title=f"in {PRECISION}")
axes.legend(frameon=False)
display(figure)
print("skipped steps in each epoch:", history.history["skipped_steps"])

# %% [markdown]
# ## Lint: what is wrong before training
#
# It looks at layers, optimizer and graph, and runs no step.

# %%
batch = next(iter(train_batches))
findings = tfamp.lint(model, batch)
for finding in findings:
    print(f"{finding.severity} {finding.rule}, {finding.layer or 'the model'}")
    print(f"  {finding.message}\n  {finding.fix}\n")
print(f"{len(findings)} findings")

# %% [markdown]
# This is how findings look, in a model that has the mistakes on purpose:

# %%
command("lint", "recipes.failures", "--config.failure=float16_softmax")

# %% [markdown]
# ## Probe: what float16 would lose
#
# A few steps in float32, observed; your model is afterwards as it was.

# %%
probed = tfamp.probe(model, train_batches, steps=8)
print(f"{probed.recommended_precision}, scale {probed.recommended_scale:g}")
print(probed.reason)
print("keep in float32:", ", ".join(probed.float32_layers) or "nothing more")
probed.save(results / "probe" / "probe.json")
probed.plot(results / "probe.png")
display(Image(results / "probe.png", width=700))

# %% [markdown]
# The top: gradients by power of two. Dark gray is what float16 flushes to
# zero, light gray what it keeps with fewer bits; the arrow is what the loss
# scale does. The middle: what is lost at each scale. The bottom: each layer.
#
# ## Parity: do 16 bits reach what 32 do?
#
# The same seeds in each precision, each run in a process of its own; then an
# equivalence test of a metric that `train` returns, within a margin that you
# choose, in that metric's unit. Two seeds only show how it goes; take five for
# a verdict to rely on.

# %%
command(
    "parity",
    str(recipe_file),
    f"--precisions=float32,{PRECISION}",
    f"--seeds={SEEDS}",
    "--metric=loss",
    "--margin=0.02",
    f"--config.epochs={EPOCHS}",
    f"--output_dir={results}/parity",
)

# %% [markdown]
# ## Bench: how much faster, in how much memory?

# %%
command(
    "bench",
    str(recipe_file),
    f"--precisions=float32,{PRECISION}",
    f"--rounds={ROUNDS}",
    "--steps=10",
    f"--output_dir={results}/bench",
)

# %% [markdown]
# ## The report
#
# All three on one page, a single file that opens offline.

# %%
found = [results / name for name in ("parity", "bench", "probe")]
page = write.write_combined(found, folder / "report.html")
print(f"wrote {page}")
text = html.escape(page.read_text(encoding="utf-8"))
frame = f'<iframe srcdoc="{text}" width="100%" height="700"></iframe>'
display(HTML(f"<div>{frame}</div>"))
