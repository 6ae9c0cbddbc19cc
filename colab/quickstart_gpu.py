# %% [markdown]
# # From float32 to mixed precision in five lines
#
# - **What you will see:** a Keras model trained in float32, the five lines that
#   take it to mixed precision, and both side by side: the time of a step, the
#   memory, the accuracy.
# - **How long it takes:** half a minute on two CPU cores, some two minutes on a
#   GPU, where the model is larger (not run on one yet), after the setup.
# - **Which runtime:** GPU, a T4 or newer. A CPU runs every cell; what its
#   numbers mean is said where they are.

# %%
import keras
import numpy as np
import tensorflow as tf
from IPython.display import SVG
from keras import layers

import tfamp
from recipes import image_classification
from tfamp.analysis.page import plots

tfamp.recipe.quiet_tensorflow()

# Larger where there is an accelerator: 16 bits need large products to be fast.
hardware = tfamp.detect_hardware()
LARGE = hardware.kind != "cpu"
WIDTH = 128 if LARGE else 16
IMAGE_SIZE = 96 if LARGE else 16
BATCH_SIZE = 256 if LARGE else 64
EPOCHS = 12 if LARGE else 5

advice = tfamp.recommend(hardware)
print(*hardware.device_names)
print(advice.precision)
print(advice.reason)

# %% [markdown]
# ## A model as it is
#
# A small convolutional network of nothing but Keras layers, and 1,797 real
# handwritten digits, which come with scikit-learn.

# %%
train_batches, eval_batches = image_classification.make_datasets(
    image_classification.Config(
        image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, augment="none"
    )
)
# In memory, so that the time of a step is the model's and not the data's.
train_batches, eval_batches = train_batches.cache(), eval_batches.cache()


def my_model():
    return keras.Sequential(
        [
            keras.Input([IMAGE_SIZE, IMAGE_SIZE, 1]),
            layers.Conv2D(WIDTH, 3, padding="same", activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Conv2D(2 * WIDTH, 3, 2, padding="same", activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.Conv2D(4 * WIDTH, 3, 2, padding="same", activation="relu"),
            layers.BatchNormalization(momentum=0.9),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax"),
        ]
    )


model = my_model()
model.compile(
    optimizer=keras.optimizers.AdamW(3e-3),
    loss="categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(train_batches, epochs=1, shuffle=False, verbose=2)

# %% [markdown]
# ## The five lines
#
# Each says beside it what it is for. That is all: model, data, loss and metrics
# stay as they are.

# %%
PRECISION = (
    # Where float32 is the advice, to have something to compare it with.
    "mixed_bfloat16" if advice.precision == "float32" else advice.precision
)
histories = {}
memory = {}
for precision in ("float32", PRECISION):
    if hardware.kind == "gpu":
        tf.config.experimental.reset_memory_stats("GPU:0")
    keras.utils.set_random_seed(0)

    tfamp.set_precision(precision)  # 1: new layers compute in this precision.
    model = my_model()
    tfamp.keep_float32(model)  # 2: outputs, softmax and norms do in float32.
    model.compile(
        # 3: a loss scale where float16 needs one, and no step with an inf.
        optimizer=tfamp.wrap_optimizer(keras.optimizers.AdamW(3e-3)),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
        auto_scale_loss=False,  # 4: as 3 has done it.
    )
    history = tfamp.fit(  # 5: in place of model.fit.
        model,
        train_batches,
        epochs=EPOCHS,
        validation_data=eval_batches,
        verbose=0,
    )
    histories[precision] = history.history
    print(precision, tfamp.evaluate(model, eval_batches))

    # On a GPU this is measured. On a CPU it is what the layers' outputs of one
    # batch take, which a training step keeps for its backward pass.
    memory[precision] = history.history.get(
        "peak_memory_bytes",
        [
            sum(
                BATCH_SIZE
                * np.prod(layer.output.shape[1:])
                * tf.as_dtype(layer.compute_dtype).size
                for layer in model.layers
            )
        ],
    )[-1]

# %% [markdown]
# ## Side by side

# %%
milliseconds = {
    # Without the first epoch, which traces and compiles.
    precision: np.median(history["step_milliseconds"][1:])
    for precision, history in histories.items()
}
accuracy = {p: h["val_accuracy"][-1] for p, h in histories.items()}
is_measured = "peak_memory_bytes" in histories["float32"]

figure = plots.new_figure(plots.WIDE, 2.8)
for place, (title, values, form) in enumerate(
    (
        ("milliseconds a step", milliseconds, "{:.3g}"),
        (
            "peak memory, MB" if is_measured else "layers' outputs, MB",
            {p: count / 1e6 for p, count in memory.items()},
            "{:.3g}",
        ),
        ("test accuracy", accuracy, "{:.3f}"),
    )
):
    axes = figure.add_subplot(1, 3, place + 1)
    bars = axes.bar(
        [precision.replace("_", "\n") for precision in values],
        list(values.values()),
        color=[plots.COLORS[precision] for precision in values],
        width=0.6,
    )
    axes.bar_label(bars, [form.format(value) for value in values.values()])
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.grid(False)
SVG(plots.to_svg(figure))

# %%
figure = plots.new_figure(plots.WIDE, 3.2)
axes = figure.subplots()
for precision, history in histories.items():
    axes.plot(
        range(1, EPOCHS + 1),
        history["val_accuracy"],
        color=plots.COLORS[precision],
        marker=plots.MARKERS[precision],
        # Curves that agree lie on each other: the broad pale one shows.
        **({"lw": 6, "alpha": 0.3} if precision == "float32" else {}),
        label=precision,
    )
axes.set(xlabel="epoch", ylabel="test accuracy", xticks=range(1, EPOCHS + 1))
axes.legend(frameon=False)
SVG(plots.to_svg(figure))

# %%
ratio = milliseconds[PRECISION] / milliseconds["float32"]
print(f"{PRECISION} takes {ratio:.2f} of float32's time for a step here.")
if hardware.kind == "cpu":
    print(
        "This is a CPU and a small model: a ratio near 1, or above it, is what "
        "to expect, and says nothing of a GPU. Memory is computed here from "
        "the layers' outputs, not measured."
    )
    print(advice.reason)
elif ratio > 0.9:
    print("Larger products gain more: try WIDTH or BATCH_SIZE of twice that.")

# %% [markdown]
# ## What these numbers are worth
#
# - **Time.** One process, one after the other, is a first look. `tfamp bench
#   RECIPE --output_dir=DIR` runs each precision in processes of its own and in
#   turn, gives the spread over rounds, and says when a ratio means little.
# - **Accuracy.** One seed shows no difference smaller than that between seeds:
#   with 360 test images, one image is 0.003. `tfamp parity RECIPE
#   --output_dir=DIR` trains several seeds and tests for equivalence.
# - **Memory.** Weights and the optimizer's moments stay in float32; what halves
#   is what lies between the layers, and that is most of it in large batches.
#
# Next: `bring_your_own_model`, to do this with a model of yours;
# `find_the_nan`, for when it goes wrong.
