# %% [markdown]
# # A TPU in bfloat16: images and language
#
# - **What you will see:** the image and the language recipe trained in
#   `mixed_bfloat16` by one flag each, and what a TPU asks for that a GPU does
#   not: no loss scaling, a global batch, a loop on the device, static shapes.
# - **How long it takes:** half a minute on two CPU cores, after the setup. On a
#   TPU runtime that first installs TensorFlow, which takes some minutes.
# - **Which runtime:** TPU, or CPU: the same cells run on both. **Nobody has run
#   this on a TPU yet.** What is below was run on CPUs; where a cell fails on a
#   TPU, an issue with its message is welcome.

# %%
import pathlib
import tempfile

import keras
import tensorflow as tf
from IPython.display import SVG, display

import tfamp
from recipes import image_classification, language_model
from tfamp.analysis.report import run_logs, run_plots

tfamp.recipe.quiet_tensorflow()

ON_TPU = bool(tf.config.list_physical_devices("TPU"))
STRATEGY = "tpu" if ON_TPU else "auto"
LONG = ON_TPU  # True trains for as long as the recipes do.

strategy = tfamp.get_strategy(STRATEGY)
print(type(strategy).__name__, strategy.num_replicas_in_sync, "replica(s)")

# %% [markdown]
# `tfamp.get_strategy("tpu")` connects to the TPU and starts it. A TPU v2-8 has
# 8 replicas, a v5e-1 has one. On a CPU, "auto" takes what is there.
#
# ## No loss scaling
#
# A TPU multiplies in bfloat16, which has float32's exponents: what is a normal
# number in the one is so in the other. float16 would need a loss scale, and a
# TPU has no float16 units; on one, `tfamp.set_precision("mixed_float16")` is
# refused.

# %%
for name in ("float32", "bfloat16", "float16"):
    number_format = tfamp.FORMATS[name]
    print(
        f"{name:8}  largest {number_format.max:.3g}, "
        f"smallest normal {number_format.min_normal:.3g}, "
        f"spacing at 1 {number_format.epsilon:.3g}"
    )

# %% [markdown]
# The optimizer is wrapped all the same, with a scale that stays at 1: a step
# that is not finite is skipped in every precision, and a checkpoint has one
# layout in all of them, so that a run may begin on a GPU in float16 and go on
# here.

# %%
with strategy.scope():
    optimizer = tfamp.wrap_optimizer(
        keras.optimizers.AdamW(1e-3), precision="mixed_bfloat16"
    )
print("scale", float(optimizer.dynamic_scale))

# %% [markdown]
# ## Images, by one flag
#
# A recipe is a module with a `Config`, whose fields are its flags. In a shell
# this would be
#
#     python -m recipes.image_classification --strategy=tpu \
#         --precision=mixed_bfloat16
#
# `batch_size` is that of a whole step, over all replicas: with 8 of them each
# gets an eighth. The numbers of the training are those of the global batch,
# whatever the replicas. A TPU wants it large: its matrix units are 128 wide.

# %%
runs = pathlib.Path(tempfile.mkdtemp())
image_config = image_classification.Config(
    precision="mixed_bfloat16",
    strategy=STRATEGY,
    batch_size=128,
    epochs=30 if LONG else 3,
    warmup_epochs=2.0 if LONG else 0.5,
    ema_momentum=0.98 if LONG else 0.8,
    output_dir=str(runs / "images"),
)
print(image_classification.train(image_config))

# %% [markdown]
# ### Static shapes
#
# XLA compiles a step for one shape. A smaller last batch would be compiled for
# itself, which can take longer than an epoch; so the recipes leave it out of
# the training data, and the batch size is part of the shape:

# %%
train_batches, eval_batches = image_classification.make_datasets(image_config)
print("training  ", train_batches.element_spec[0].shape)
print("evaluation", eval_batches.element_spec[0].shape)

# %% [markdown]
# In evaluation each example counts, also those of a smaller last batch, exactly
# once. For text it is the same: all sequences have one length.
#
# ### The loop on the device
#
# Between two steps a TPU should not wait for Python. `tfamp.fit` runs several
# steps in one graph call: as many as take about half a second, or as
# `steps_per_loop` says. What callbacks see is the end of each call.

# %% [markdown]
# ## Language, by the same flag
#
# A GPT on the bytes of Python's own documentation. What differs between the two
# calls is the recipe's name.

# %%
small = {} if LONG else {"num_layers": 2, "width": 64, "sequence_length": 64}
language_config = language_model.Config(
    precision="mixed_bfloat16",
    strategy=STRATEGY,
    steps_per_loop=10,
    batch_size=128 if LONG else 16,
    epochs=8 if LONG else 3,
    steps_per_epoch=0 if LONG else 20,
    eval_steps=0 if LONG else 5,
    warmup_steps=100 if LONG else 10,
    sample_length=400 if LONG else 0,
    output_dir=str(runs / "language"),
    **small,
)
print(language_model.train(language_config))

# %% [markdown]
# ## What the runs left
#
# `metrics.jsonl`, `scale.jsonl`, TensorBoard's scalars, and `run.json`, which
# says on what it was trained. `tfamp report DIR` makes a page of it.

# %%
for name, metric in (("images", "accuracy"), ("language", "loss")):
    logs = run_logs.read(runs / name)
    print(name, sorted(path.name for path in (runs / name).iterdir()))
    display(SVG(run_plots.metric(logs.epochs, metric, "mixed_bfloat16").svg))

# %% [markdown]
# ## Is it as good as float32?
#
# The same config with `precision="float32"` would be the other half. But one
# run of each shows little: `tfamp parity recipes.language_model
# --output_dir=DIR` trains several seeds of each, and tests whether they are
# equivalent.

# %% [markdown]
# ## What differs from a GPU, in short
#
# | | GPU | TPU |
# |---|---|---|
# | precision | bfloat16 from compute capability 8.0 on, else float16 | bfloat16 |
# | loss scaling | for float16 | none |
# | replicas | one for each GPU | one for each core or chip |
# | shapes | a smaller last batch costs little | each shape is compiled anew |
# | XLA | `jit="auto"` turns it on | always |
# | several steps in a call | helps small models | always |
# | widths | multiples of 8 | multiples of 128 |
