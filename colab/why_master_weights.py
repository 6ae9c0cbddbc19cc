# %% [markdown]
# # Why weights stay in float32
#
# - **What you will see:** updates too small to move a 16-bit weight: one by
#   hand, then those of a network, and what comes of its training. Mixed
#   precision keeps the weights in float32, as "master weights", and computes
#   with 16-bit copies of them.
# - **How long it takes:** half a minute on two CPU cores.
# - **Which runtime:** CPU. The networks are small, and rounding is the same
#   everywhere.

# %%
# %matplotlib inline
import statistics

import keras
import ml_dtypes
import numpy as np
from IPython.display import display

import tfamp
from benchmarks import ablations
from recipes import failures
from recipes.failures import sixteen_bit_weights, task
from tfamp.analysis.page import plots
from tfamp.formats import FORMATS, convert, spacing

ON_ACCELERATOR = tfamp.detect_hardware().kind != "cpu"
EPOCHS = 30 if ON_ACCELERATOR else 6
SEEDS = 5 if ON_ACCELERATOR else 2

TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
COLORS = {name: plots.COLORS[f"mixed_{name}"] for name in TYPES}

# %% [markdown]
# ## One weight, one update
#
# A sum is rounded to a number of the format. What is less than half the gap to
# the neighbour is lost, in this step and in all that follow.

# %%
weight, update = 0.5, 1e-4
for name in ("float32", *TYPES):
    held = FORMATS[name]
    moved = convert(weight + update, held).result
    half = spacing(weight, held) / 2
    print(f"{name}: {weight} + {update} = {moved:.7g}; half a gap: {half:.3g}")

# %% [markdown]
# The gap grows with the weight, so what counts is the ratio of the two. A
# number just above a power of two has, in proportion, twice the gap of one
# just below:

# %%
for name in ("float32", *TYPES):
    epsilon = FORMATS[name].epsilon
    print(
        f"{name}: lost where update / weight is below {epsilon / 4:.2g}, "
        f"kept where it is above {epsilon / 2:.2g}"
    )

# %% [markdown]
# ## The updates of a network
#
# A small classifier of handwritten digits, from `recipes.failures`, learns for
# two epochs in float32. Then comes one step of plain gradient descent. How
# large are its updates beside their weights?


# %%
def build(precision, master_weights, learning_rate):
    """The classifier, under plain gradient descent."""
    keras.utils.set_random_seed(0)
    with tfamp.precision_scope(precision):
        model = sixteen_bit_weights.build_model(healed=master_weights)
        optimizer = keras.optimizers.SGD(learning_rate)
        if master_weights:
            optimizer = tfamp.wrap_optimizer(optimizer)
        model.compile(optimizer, model.loss, auto_scale_loss=False)
    return model


def batches():
    return task.make_batches(task.flat_pixels, "digits", "", 64, seed=0)[0]


def flat(weights):
    return np.concatenate([weight.ravel() for weight in weights])


LEARNING_RATE = 3e-3
keras.utils.set_random_seed(0)
with tfamp.precision_scope("float32"):
    model = sixteen_bit_weights.build_model(healed=True)
    tfamp.fit(model, batches(), epochs=2, verbose=0)
start = model.get_weights()

# With a learning rate of 1 a step subtracts the gradients.
model = build("float32", master_weights=True, learning_rate=1.0)
model.set_weights(start)
tfamp.fit(model, batches().take(1), verbose=0)
weights = flat(start)
gradients = weights - flat(model.get_weights())
moving = gradients != 0
weights, gradients = weights[moving], gradients[moving]
print(f"{len(weights):,} weights have a gradient, of {moving.size:,}")


# %%
def share_lost(name, learning_rate):
    """The share of updates that leave a weight of this format as it was."""
    held = weights.astype(TYPES[name])
    updated = held.astype("float32") - learning_rate * gradients
    return np.mean(updated.astype(TYPES[name]) == held)


figure = plots.new_figure(plots.WIDE, 4.4)
axes = figure.subplots()
updates = LEARNING_RATE * np.abs(gradients)
axes.scatter(np.abs(weights), updates, s=4, lw=0, alpha=0.3, color="#333333")
sizes = np.geomspace(1e-3, 1, 2000)
for name, color in COLORS.items():
    halves = [spacing(size, FORMATS[name]) / 2 for size in sizes]
    lost = share_lost(name, LEARNING_RATE)
    label = f"half a gap of {name}: {lost:.0%} are lost"
    axes.plot(sizes, halves, color=color, label=label)
axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-8, 1e-2))
axes.set(xlabel="size of the weight", ylabel="size of its update")
axes.set_title(f"learning rate {LEARNING_RATE}: below a line, nothing moves")
axes.legend(frameon=False, loc="upper left")
display(figure)

# %% [markdown]
# Each dot is a weight. Half the learning rate moves all dots down by a factor
# of two, and so do gradients of half the size, later in training. The share
# that is lost at each learning rate:

# %%
figure = plots.new_figure(plots.WIDE, 3.4)
axes = figure.subplots()
rates = np.geomspace(1e-5, 1, 61)
for name, color in COLORS.items():
    shares = [share_lost(name, rate) for rate in rates]
    axes.plot(rates, shares, color=color, label=f"weights in {name}")
axes.axvline(LEARNING_RATE, color="#555555", lw=1, ls=":")
axes.set(xscale="log", ylim=(0, 1), xlabel="learning rate")
axes.set(ylabel="share of updates lost")
axes.legend(frameon=False)
display(figure)

# %% [markdown]
# ## What comes of it
#
# All go on from the same weights, with the same batches. With master weights
# both formats learn as float32 does.

# %%
ARMS = {
    "float32": ("float32", True),
    "float16, master weights": ("mixed_float16", True),
    "float16, weights too": ("mixed_float16", False),
    "bfloat16, master weights": ("mixed_bfloat16", True),
    "bfloat16, weights too": ("mixed_bfloat16", False),
}
losses = {}
for arm, (precision, master_weights) in ARMS.items():
    model = build(precision, master_weights, LEARNING_RATE)
    model.set_weights(start)
    config = failures.Config(healed=master_weights, epochs=EPOCHS)
    losses[arm] = failures.fit(model, batches(), config).history["loss"]
    first, last = losses[arm][0], losses[arm][-1]
    print(f"{arm}: loss {first:.4f} to {last:.4f}")

# %%
figure = plots.new_figure(plots.WIDE, 3.8)
axes = figure.subplots()
for arm, (precision, master_weights) in ARMS.items():
    # Broad and pale, float32 is seen under the curves that agree with it.
    is_reference = precision == "float32"
    axes.plot(
        range(1, EPOCHS + 1),
        losses[arm],
        marker=plots.MARKERS[precision],
        ms=4,
        color=plots.COLORS[precision],
        ls="-" if master_weights else "--",
        lw=6 if is_reference else 1.5,
        alpha=0.25 if is_reference else 1.0,
        label=arm,
    )
axes.xaxis.get_major_locator().set_params(integer=True)
axes.set(xlabel="epoch", ylabel="training loss")
axes.legend(frameon=False)
display(figure)

# %% [markdown]
# ## Adam fares worse
#
# The policy `float16`, where `mixed_float16` was meant, puts the optimizer's
# moments in 16 bits too. Adam averages squares of gradients, and divides by
# their root.

# %%
smallest = (FORMATS["float16"].min_subnormal / 2) ** 0.5
flushed = np.mean(np.abs(gradients) <= smallest)
print(f"float16: squares of gradients up to {smallest:.2g} are 0", end="; ")
print(f"here these are {flushed:.0%} of the gradients")
decay = convert(0.999, FORMATS["bfloat16"]).result
print(f"bfloat16: 0.999, by which the averages decay, becomes {decay:g}")

# %%
for precision in ("mixed_float16", "mixed_bfloat16"):
    for healed in (True, False):
        keras.utils.set_random_seed(0)
        with tfamp.precision_scope(precision):
            model = sixteen_bit_weights.build_model(healed)
            config = failures.Config(healed=healed, epochs=EPOCHS)
            history = failures.fit(model, batches(), config)
        name = precision if healed else precision.removeprefix("mixed_")
        print(f"Adam, policy {name}: loss {history.history['loss'][-1]:.3f}")

# %% [markdown]
# Lint says so before the first step:

# %%
for finding in tfamp.lint(model):
    print(f"{finding.severity} {finding.rule}, {finding.layer}")
    print(f"    {finding.message}\n    {finding.fix}")

# %% [markdown]
# ## Where little is lost
#
# Not every training needs master weights. In the ablation of
# `benchmarks/ablations.py` the same network learns from the beginning, with
# learning rate 0.01 and momentum 0.9. In one arm its weights are rounded to
# float16 after each step; the optimizer computes in float32 in both.

# %%
for arm in ablations.ARMS:
    if arm.name in ("mixed precision", "without float32 master weights"):
        accuracies = [
            ablations.train(arm, "digits", EPOCHS, seed)["accuracy"]
            for seed in range(SEEDS)
        ]
        shown = ", ".join(f"{accuracy:.1f}%" for accuracy in accuracies)
        mean = statistics.mean(accuracies)
        print(f"{arm.name}: {shown}; mean {mean:.1f}%")
lost = share_lost("float16", 0.01 / (1 - 0.9))
print(f"momentum makes a learning rate of 0.1; then {lost:.0%} were lost above")

# %% [markdown]
# Momentum adds up what is too small in one step. Five seeds and twenty epochs
# of it are in `benchmarks/results/ablations.md`, beside what Micikevicius et
# al. found (2018, "Mixed Precision Training", section 3.1): a speech model
# that was 80% worse, relatively, without master weights.
#
# In tfamp: `tfamp.set_precision("mixed_bfloat16")`, or `"mixed_float16"`, and
# weights, moments and averages are float32.
