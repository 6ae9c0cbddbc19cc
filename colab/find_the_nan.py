# %% [markdown]
# # A run that dies, and how to find out why
#
# - **What you will see:** a small attention model whose loss is NaN from the
#   first step on. `tfamp.lint` sees the danger before training, `tfamp.probe`
#   measures it, `on_overflow="blame"` catches it in the act. Mended, the same
#   model trains in 16 bits as well as in 32. Then a second run that dies of
#   something else and looks just the same.
# - **How long it takes:** half a minute on two CPU cores, after the setup.
# - **Which runtime:** CPU. A GPU will do as well: the numbers that overflow are
#   the same everywhere.

# %% [markdown]
# ## The run
#
# The model reads handwritten digits row by row: a row of 8 gray levels is a
# token, and attention connects the rows. It is `recipes.failures`'
# `attention_overflow`, made to fail on purpose, as models fail that nobody
# meant to break: the gray levels come as they are stored, and the attention
# logits are not divided by the root of the key's size.

# %%
import keras
import tensorflow as tf
from IPython.display import SVG

import tfamp
from recipes import failures
from recipes.failures import curves
from tfamp.analysis.page import plots
from tfamp.analysis.probe.histogram import MIN_EXPONENT

tfamp.recipe.quiet_tensorflow()
EPOCHS = 8

config = failures.Config(failure="attention_overflow", epochs=EPOCHS)
train_batches, eval_batches = failures.make_datasets(config)

tfamp.set_precision("mixed_float16")
keras.utils.set_random_seed(config.seed)
model = failures.build_model(config)
broken = model.fit(train_batches, epochs=3, shuffle=False, verbose=2)

# %% [markdown]
# The loss is NaN, and so is everything after it. That is all that stock Keras
# says, and it says it after the damage: the weights are NaN as well. It could
# be the data, the learning rate, the loss, a division by zero or the precision.
#
# ## Before training: lint
#
# `tfamp.lint` traces what the model computes and runs no step. Each finding
# names a layer, and brings code to paste.

# %%
keras.utils.set_random_seed(config.seed)
model = failures.build_model(config)

for finding in tfamp.lint(model, next(iter(train_batches))):
    print(f"{finding.severity} {finding.rule} {finding.layer}")
    print(f"    {finding.message}")
    print("    " + finding.fix.replace("\n", "\n    "))

# %% [markdown]
# The first finding points at the attention. A lint knows that such a softmax
# *can* overflow, not that this one will: that depends on the numbers.
#
# ## A few steps observed: probe
#
# `tfamp.probe` runs some training steps in float32, where nothing is cut off,
# and counts by powers of two what passes through each layer. Afterwards the
# model is as it was before.

# %%
report = tfamp.probe(model, train_batches, steps=4)

print(report.recommended_precision, f"{report.recommended_scale:g}")
print(report.reason)
print("keep in float32:", *report.float32_layers)

# %%
figure = plots.new_figure(height=3.6)
axes = figure.subplots()
for tensor in report.tensors:
    if tensor.kind == "activation":
        (held,) = tensor.histogram.by_exponent.nonzero()
        first, last = held[[0, -1]] + MIN_EXPONENT
        axes.barh(
            tensor.layer,
            last + 1 - first,
            left=first,
            color=plots.COLORS["mixed_float16"]
            if tensor.layer in report.float32_layers
            else plots.MORE_COLORS[0],
        )
axes.axvline(16, color="black")
axes.text(16.2, -1, "float16 ends", va="center")
axes.set(
    xlim=(-26, 22), xlabel="log2 of the outputs, from the least to the largest"
)
axes.invert_yaxis()
SVG(plots.to_svg(figure))

# %% [markdown]
# Each bar is what one layer puts out, from the smallest power of two to the
# largest. float16 ends at 65504, just below 2^16, and the products of queries
# and keys, `logits`, go beyond it. The advice is four layers wide (in orange),
# because a float32 product helps little whose operands are float16, and because
# the softmax after it must be able to take the result. (Its small weights, far
# beyond the left edge, become zero; that harms nothing.)
#
# ## In the act: blame
#
# The run itself can tell, without a probe. `tfamp.fit` skips a step that is not
# finite, so the weights stay whole, and with `on_overflow="blame"` it runs that
# step again, asks every layer, and says which was the first.

# %%
try:
    tfamp.fit(model, train_batches, on_overflow="blame", verbose=0)
except tfamp.LossScaleError as error:
    print(error)

# %% [markdown]
# A loss scale that is too large is the usual reason for a skipped step, and
# halving it is the cure. Here it fell to its floor, and each step was still
# lost: the forward pass overflows, which no scale can mend. So the run ends,
# and says which layer it was and how large its numbers would have been.
#
# ## Mended
#
# One line, with the layers that the probe named: the rest stays in 16 bits.

# %%
keras.utils.set_random_seed(config.seed)
model = failures.build_model(config)
tfamp.keep_float32(model, report.float32_layers)
mended = tfamp.fit(model, train_batches, epochs=EPOCHS, verbose=0)
print("mixed_float16, mended:", tfamp.evaluate(model, eval_batches))

keras.utils.set_random_seed(config.seed)
with tfamp.precision_scope("float32"):
    model = failures.build_model(config)
float32 = tfamp.fit(model, train_batches, epochs=EPOCHS, verbose=0)
print("float32:              ", tfamp.evaluate(model, eval_batches))

# %%
SVG(
    curves.as_svg(
        [
            curves.Curve(
                "mixed_float16, mended",
                "o",
                plots.COLORS["mixed_float16"],
                mended.history["loss"],
            ),
            curves.Curve(
                "float32",
                ".",
                plots.COLORS["float32"],
                float32.history["loss"],
            ),
        ],
        "loss",
        "Mended, 16 bits learn what 32 bits learn",
    )
)

# %% [markdown]
# ## The same death, another reason
#
# Now one pixel of one image is NaN, as a broken file or a division by an empty
# mask would leave it. Stock Keras would show the same NaN loss. Blame does not
# say "forward pass" this time.

# %%
images, labels = next(iter(train_batches))
images = tf.tensor_scatter_nd_update(images, [[41, 0, 0]], [float("nan")])
poisoned = tf.data.Dataset.from_tensors((images, labels))

keras.utils.set_random_seed(config.seed)
model = failures.build_model(config)
tfamp.keep_float32(model, report.float32_layers)
history = tfamp.fit(
    model,
    poisoned.concatenate(train_batches),
    on_overflow="blame",
    verbose=0,
)
print("skipped steps:", history.history["skipped_steps"])
print("loss:", history.history["loss"])

# %% [markdown]
# It names the row of the batch. The step was skipped, and the run went on: one
# bad image costs one step, not the run.
#
# ## Which one when
#
# | | what it needs | what it tells |
# |---|---|---|
# | `tfamp.lint(model, batch)` | no step | what can go wrong, and the code for it |
# | `tfamp.probe(model, dataset)` | a few steps in float32 | how large the numbers are, layer by layer; precision, scale, layers for float32 |
# | `tfamp.fit(..., on_overflow="blame")` | the run itself | who was first, in the step that failed: data, weights, forward, loss, backward, or only the scale |
#
# With a model of your own: `tfamp lint my_recipe.py`, `tfamp probe my_recipe.py
# --output_dir=DIR`, `python my_recipe.py --on_overflow=blame`.
