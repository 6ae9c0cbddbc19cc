# %% [markdown]
# # After training: other precisions, other runtimes, fewer bits
#
# - **What you will see:** a network trained in bfloat16, loaded in float32 and
#   in float16; exported to files that were run before they were left; stored in
#   8 and 4 bits with the accuracy of each; and what a T4 would make of it.
# - **How long it takes:** a minute on two CPU cores, after the setup.
# - **Which runtime:** CPU. A GPU will do as well.

# %% [markdown]
# ## A trained network
#
# Handwritten digits of scikit-learn, 8 by 8 pixels.

# %%
import keras
import numpy as np
import tensorflow as tf
from sklearn import datasets

import tfamp

tfamp.recipe.quiet_tensorflow()
keras.utils.set_random_seed(0)
tfamp.set_precision("mixed_bfloat16")

digits = datasets.load_digits()
images = (digits.images[..., None] / 8 - 1).astype("float32")
labels = digits.target
x, y, test_x, test_y = (
    images[:1400],
    labels[:1400],
    images[1400:],
    labels[1400:],
)

model = keras.Sequential(
    [
        keras.Input([8, 8, 1]),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="gelu"),
        keras.layers.Dense(10, name="logits"),
    ]
)
model.compile(
    "adam",
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
tfamp.fit(model, x, y, batch_size=64, epochs=5, verbose=0)
model.save("digits.keras")


def accuracy(logits):
    return float(np.mean(np.argmax(logits, -1) == test_y))


print("trained in bfloat16:", accuracy(tfamp.predict(model, test_x)))

# %% [markdown]
# ## In another precision
#
# The file holds float32 weights, whatever the precision. `tfamp.load_model`
# computes with them in any.

# %%
for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
    loaded = tfamp.load_model("digits.keras", precision)
    print(precision, accuracy(tfamp.predict(loaded, test_x)))

# %% [markdown]
# ## In another runtime
#
# The network computes in bfloat16; the files are traced in float32. Each is
# loaded in its own runtime, run on the batch and on its first row, and compared
# with the network in float32. What does not run is not left behind. ONNX needs
# `pip install 'tfamp[export]'`.

# %%
for path, format in (
    ("digits", "saved_model"),
    ("digits.tflite", "litert"),
    ("digits.onnx", "onnx"),
):
    try:
        print(tfamp.export(model, path, format, batch=test_x[:32]))
    except tfamp.InputError as error:
        print(error)

served = tf.saved_model.load("digits")
print("SavedModel:", accuracy(served.serve(test_x)))

# %% [markdown]
# ## In fewer bits
#
# `quantize=` stores weights in int8 or int4, here by Keras's own quantizer;
# LiteRT's and ONNX Runtime's are asked in the same way. The report says how
# many of the weights that were: Keras quantizes no convolution.

# %%
for kind in ("int8", "int4"):
    report = tfamp.export(
        model, f"{kind}.keras", "keras", quantize=kind, batch=test_x[:32]
    )
    small = tfamp.load_model(report.path)
    print(report)
    print("    accuracy", accuracy(small.predict(test_x, verbose=0)))

# %% [markdown]
# `tfamp export RECIPE --quantize=int8,int4` does this for a recipe, and tests
# whether the accuracy is within a margin of float32's.
#
# ## On other hardware
#
# Each device computes in the precision that it is fast in. What a T4 or an H100
# would make of the same weights shows on any machine: the numbers that they can
# hold are known.

# %%
from tfamp.analysis.portability import measure, part

batches = tf.data.Dataset.from_tensor_slices((test_x, test_y)).batch(64)
record = measure.measure(
    lambda precision: tfamp.load_model("digits.keras", precision),
    batches,
    measure.devices(["T4", "H100", "TPU v5e", "cpu"]),
    margin=0.02,
)
for row in record["devices"]:
    print(
        f"{row['device']:8} {row['precision']:15} accuracy {row['metric']:.4f} "
        f"largest difference {row['largest_difference']:.2g} {row['verdict']}"
    )
print(part.verdict(record))
