# %% [markdown]
# # What 16 and 8 bits do to a number
#
# - **What you will see:** what float16, bfloat16 and two kinds of float8 make
#   of a number: the range, the gaps, the gradients that vanish, the attention
#   logits that overflow. Five questions for you, each answered by the cell
#   below it.
# - **How long it takes:** 15 seconds on two CPU cores; an hour, if you guess
#   before you look.
# - **Which runtime:** CPU. Numbers are the same everywhere.

# %%
# %matplotlib inline
import math

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from IPython.display import display

import tfamp
from recipes import failures
from tfamp import cli
from tfamp.analysis.page import plots
from tfamp.analysis.probe import format_losses, histogram
from tfamp.formats import FORMATS, convert, convert_scaled, spacing
from tfamp.recipe.subject import open_subject

try:
    from ipywidgets import FloatLogSlider, IntSlider, interact
except ModuleNotFoundError:
    interact = None  # The plots with a slider then show one setting of it.

ON_ACCELERATOR = tfamp.detect_hardware().kind != "cpu"
PROBED_STEPS = 100 if ON_ACCELERATOR else 8
TOKENS = 1024 if ON_ACCELERATOR else 128

FLOAT16, BFLOAT16 = FORMATS["float16"], FORMATS["bfloat16"]
COLORS = {
    "float32": plots.COLORS["float32"],
    "float16": plots.COLORS["mixed_float16"],
    "bfloat16": plots.COLORS["mixed_bfloat16"],
    "float8_e4m3fn": plots.MORE_COLORS[0],
    "float8_e5m2": plots.MORE_COLORS[1],
}
GREEN, _, YELLOW, SKY = plots.MORE_COLORS
NARROW = [name for name in COLORS if name != "float32"]

# %% [markdown]
# ## The formats
#
# A floating-point number is a sign, an exponent and a mantissa. The exponent's
# bits make the range, the mantissa's bits the precision. bfloat16 has float32's
# exponent and gave up mantissa; float16 shared its bits out more evenly.

# %%
exit_status = cli.main(["formats"])

# %% [markdown]
# ## One number
#
# Each mark is a number that the format has, between 0 and twice yours. The
# dashed line is yours, the ring is what it becomes. Try 0.1, 1e-8 and 70000.


# %%
def draw_number(value):
    figure = plots.new_figure(plots.WIDE, 2.9)
    axes = figure.subplots()
    fine = np.linspace(0, 2 * value, 2001)
    for row, name in enumerate(NARROW):
        held = {convert(x, FORMATS[name]).result for x in fine}
        held = [x for x in held if x <= fine[-1]]  # No inf, no nan.
        axes.vlines(held, row - 0.3, row + 0.3, color=COLORS[name], lw=0.6)
        found = convert(value, FORMATS[name])
        place = min(found.result, 2 * value)  # inf: at the edge. nan: nowhere.
        style = {"mfc": "white", "mec": "black", "clip_on": False, "zorder": 3}
        axes.plot(place, row, "o", **style)
        axes.text(
            2.08 * value, row, f"{found.result:.6g}\n{found.kind}", va="center"
        )
    axes.axvline(value, color="black", ls="--", lw=1)
    axes.set_yticks(range(len(NARROW)), NARROW)
    axes.set_ylim(len(NARROW) - 0.5, -0.5)
    axes.set_xlim(0, 2 * value)
    axes.set_title(f"{value:.6g} and the numbers around it")
    axes.grid(False)
    display(figure)


if interact:
    slider = FloatLogSlider(0.1, min=-9, max=6, step=0.1, readout_format=".3g")
    interact(draw_number, value=slider)
else:
    for value in (0.1, 1e-8, 70000.0):
        draw_number(value)

# %% [markdown]
# ## All magnitudes
#
# First the relative error of rounding, at its worst in each power of two. It
# is flat where the format has normal numbers: half an epsilon. To the left it
# climbs through the subnormals, which lose a bit with each halving, up to 1:
# flushed to zero. To the right it ends: overflow.


# %%
figure = plots.new_figure(plots.WIDE, 4.2)
axes = figure.subplots()
exponents = np.arange(-150, 130)
anywhere = np.random.default_rng(0).uniform(1, 2, 50)  # In a power of two.
for name in NARROW:
    # Of normal numbers, half a gap above a power of two is rounded worst.
    places = np.append(anywhere, 1 + FORMATS[name].epsilon / 2)
    worst = [
        max(convert(x, FORMATS[name]).relative_error for x in places * 2.0**e)
        for e in exponents
    ]
    # The inf of an overflow goes up and out of the picture.
    axes.plot(exponents, np.minimum(worst, 1e9), color=COLORS[name], label=name)
axes.text(-148, 1.25, "flushed to zero", fontsize=8)
axes.text(124, 1.25, "up and out: overflow", ha="right", fontsize=8)
axes.set(yscale="log", ylim=(1e-4, 4), xlim=(-150, 130))
axes.set(xlabel="log2 of the value", ylabel="worst relative error")
axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.15, 0.4))
display(figure)

# %% [markdown]
# The same as a distance: the gap between neighbours. It grows with the number.
# Lines in parallel differ in their mantissas, lines of different length in
# their exponents; the flat part at the left is the range of the subnormals.

# %%
figure = plots.new_figure(plots.WIDE, 4.2)
axes = figure.subplots()
for name, color in COLORS.items():
    held = FORMATS[name]
    powers = 2.0 ** np.arange(-27, 19)
    powers = powers[(held.min_subnormal <= powers) & (powers <= held.max)]
    gaps = [spacing(power, held) for power in powers]
    axes.step(powers, gaps, where="post", color=color, label=name)
    is_end = powers[-1] > held.max / 2
    axes.plot(powers[-1], gaps[-1], "x" if is_end else "", color=color)
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
axes.set(xlabel="value; x: the last before overflow", ylabel="gap to the next")
axes.legend(frameon=False)
display(figure)
coarser = spacing(1.0, BFLOAT16) / spacing(1.0, FLOAT16)
print(f"The gaps of bfloat16 are {coarser:g} times those of float16.")

# %% [markdown]
# ## Question 1: does 1e-8 survive float16?
#
# Gradients of that size are common. And does it survive if the loss, and with
# it the gradient, is multiplied by 1024? By 65536? Write `True` or `False`.

# %%
my_answers = {1: None, 1024: None, 65536: None}


# %%
def tell(question, computed, mine):
    yours = "" if mine is None else f"   (you: {mine})"
    print(f"{question}: {computed}{yours}")


for scale, mine in my_answers.items():
    found = convert_scaled(1e-8, FLOAT16, scale)
    tell(f"1e-8 with scale {scale} survives", found.kind != "zero", mine)
    print(
        f"    it comes back as {found.result:.6g} ({found.kind}, relative "
        f"error {found.relative_error:.3g})"
    )

# %% [markdown]
# Scaled by 1024 it is a subnormal, with part of float16's bits; by 65536 it has
# all of them. In other formats, as `tfamp formats` shows it (first without the
# scale, then with it); bfloat16 needs no scale here: that is what its exponent
# is for.

# %%
exit_status = cli.main(["formats", "1e-8", "--scale=65536"])

# %% [markdown]
# ## Gradients under a loss scale
#
# A network with two heads, from `recipes.failures`. The loss of its second
# head counts little, so that the gradients there are small.
# `tfamp.probe` counts all gradients by power of two, in float32; move the scale
# and see what float16 would make of them. Where is it best? What happens
# beyond?

# %%
config = failures.Config(failure="no_loss_scaling", healed=True)
subject = open_subject(failures, config)
report = tfamp.probe(subject.model, subject.train_batches, steps=PROBED_STEPS)
gradients = sum(
    (t.histogram for t in report.tensors if t.kind != "activation"),
    start=histogram.of_array(np.zeros(0)),
)
print(f"{gradients.measured:,} gradients that are not zero")


# %%
def draw_gradients(scale_exponent):
    lost = format_losses.shares(gradients, "float16", 2.0**scale_exponent)
    # float16 keeps from `kept` on, with all its bits from `whole` on.
    kept = math.log2(FLOAT16.min_subnormal / 2)
    whole = math.log2(FLOAT16.min_normal)
    over = math.ceil(math.log2(FLOAT16.max))
    fates = {
        f"flushed to zero: {lost.zero:.1%}": (-200, kept, COLORS["float16"]),
        f"subnormal: {lost.subnormal:.1%}": (kept, whole, YELLOW),
        f"normal: {lost.normal:.1%}": (whole, over, GREEN),
        f"overflow: {lost.overflow:.3%}": (over, 200, "#000000"),
    }
    figure = plots.new_figure(plots.WIDE, 3.4)
    axes = figure.subplots()
    counts = gradients.by_exponent / gradients.measured
    scaled = histogram.MIN_EXPONENT + scale_exponent + np.arange(len(counts))
    for fate, (begin, end, color) in fates.items():
        inside = (begin <= scaled) & (scaled < end)
        axes.bar(
            scaled[inside] + 0.5, counts[inside], 1, color=color, label=fate
        )
        axes.axvline(end, color="#555555", lw=0.8, ls=":")
    axes.set(xlim=(-65, 25), ylim=(0, 1.1 * counts.max()))
    axes.set(xlabel="log2 of gradient times scale", ylabel="share")
    axes.set_title(f"float16, loss scale 2^{scale_exponent}")
    axes.legend(frameon=False, loc="upper left")
    display(figure)


if interact:
    slider = IntSlider(0, min=0, max=24, description="log2 scale")
    interact(draw_gradients, scale_exponent=slider)
else:
    for scale_exponent in (0, 16):
        draw_gradients(scale_exponent)

# %%
print(f"tfamp.probe advises the scale {report.advice.float16_scale:g}.")

# %% [markdown]
# ## Question 2: 1 + 1e-4
#
# A weight of 1 gets an update of 1e-4. Does it move, if the weight is kept in
# float16? In bfloat16? How many such updates must come together to move it?

# %%
my_answers = {"float16": None, "bfloat16": None}  # How many; 1 if it moves.

# %%
for name, mine in my_answers.items():
    held = FORMATS[name]
    gap = spacing(1.0, held)
    together = next(
        n for n in range(1, 1000) if convert(1 + n * 1e-4, held).result > 1
    )
    sum_of_both = convert(1 + 1e-4, held).result
    print(f"{name}: the next after 1 is {1 + gap}; 1 + 1e-4 is {sum_of_both}")
    tell("    together to move it", together, mine)

# %% [markdown]
# So mixed precision keeps the weights in float32 and only computes in 16 bits:
# see `why_master_weights`.
#
# ## Question 3: ten thousand ones
#
# Add 10,000 ones, one after another, in float16 and in bfloat16. What is the
# sum? And if each is 0.001?

# %%
my_answers = {
    (1.0, "float16"): None,
    (1.0, "bfloat16"): None,
    (0.001, "float16"): None,
    (0.001, "bfloat16"): None,
}

# %%
TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
figure = plots.new_figure(plots.WIDE, 3.4)
for axes, each in zip(figure.subplots(1, 2), (1.0, 0.001), strict=True):
    for name, dtype in TYPES.items():
        sums = np.cumsum(np.full(10_000, each, dtype)).astype(float)
        axes.plot(np.arange(1, 10_001), sums, color=COLORS[name], label=name)
        question = f"10,000 times {each} in {name}"
        tell(question, round(sums[-1], 4), my_answers.get((each, name)))
    axes.set(xscale="log", yscale="log", xlabel="terms", ylabel="sum")
    axes.set_title(f"adding {each}")
axes.legend(frameon=False)
display(figure)

# %% [markdown]
# A sum stands still where the term is no more than half the gap. So who adds
# 16-bit numbers, adds in float32. TensorFlow does, and rounds the result:

# %%
for name in ("float16", "bfloat16"):
    stop = float(np.cumsum(np.ones(10_000, TYPES[name]))[-1])
    print(
        f"{name} at {stop:g}: the next is {spacing(stop, FORMATS[name]):g} on"
    )
for name in ("float16", "bfloat16"):
    ones = tf.ones([1, 10_000], name)
    product = tf.matmul(ones, ones, transpose_b=True)
    print(f"{name}: reduce_sum {float(tf.reduce_sum(ones)):g}", end=", ")
    print(f"matmul {float(product[0, 0]):g}")

# %% [markdown]
# ## Question 4: how large do attention logits get?
#
# Queries and keys are random and normal, with standard deviation 1. Their dot
# product adds up d terms, d being the size of a head; where it is divided by
# the root of d, this often comes after the product. How large is the largest
# logit for d = 64, 512, 4096?

# %%
my_answers = {64: None, 512: None, 4096: None}

# %%
random = np.random.default_rng(0)
queries, keys, largest, aligned = {}, {}, {}, {}
for d, mine in my_answers.items():
    queries[d] = random.normal(size=[TOKENS, d]).astype("float32")
    keys[d] = random.normal(size=[TOKENS, d]).astype("float32")
    logits = queries[d] @ keys[d].T
    largest[d] = np.abs(logits).max()
    aligned[d] = np.square(queries[d]).sum(axis=1).max()
    tell(f"largest logit for d = {d}", round(largest[d]), mine)
    print(
        f"    standard deviation {logits.std():.1f} (root of d: {d**0.5:.1f}); "
        f"largest where query equals key: {aligned[d]:.0f}"
    )
print(f"largest number of float16: {FLOAT16.max:g}")

# %% [markdown]
# So float16 holds them. But logits grow with the square of the activations, and
# a network that attends learns to align queries with keys.
#
# ## Question 5: when do they overflow?
#
# At which size of the activations (the standard deviation of queries and keys)
# is the largest logit beyond float16?

# %%
my_answers = {64: None, 512: None, 4096: None}

# %%
figure = plots.new_figure(plots.WIDE, 3.8)
axes = figure.subplots()
sizes = np.geomspace(1, 100, 50)
shades = (SKY, COLORS["bfloat16"], "#000000")
for (d, mine), color in zip(my_answers.items(), shades, strict=True):
    limit = float(FLOAT16.max / largest[d]) ** 0.5
    axes.plot(sizes, largest[d] * sizes**2, color=color, label=f"d = {d}")
    axes.plot(sizes, aligned[d] * sizes**2, "--", color=color, zorder=3)
    axes.plot(limit, FLOAT16.max, "o", color=color)
    tell(f"largest size for d = {d}", round(limit, 1), mine)
    aligned_limit = (FLOAT16.max / aligned[d]) ** 0.5
    print(f"    where query equals key: {aligned_limit:.1f}")
axes.plot([], [], color="#555555", ls="--", label="query equals key")
axes.axhline(FLOAT16.max, color=COLORS["float16"], lw=1.2)
axes.text(
    1.05, 1.25 * FLOAT16.max, "float16 overflows", color=COLORS["float16"]
)
axes.set(xscale="log", yscale="log", xlim=(1, 100))
axes.set(xlabel="size of queries and keys", ylabel="largest logit")
axes.legend(frameon=False, loc="lower right")
display(figure)

# %% [markdown]
# Put to the test: float16 products of the same queries and keys, a tenth below
# that size and a tenth above. One inf is enough: the softmax of its row is
# NaN. Dividing the queries by the root of d *before* the product keeps it in
# range.


# %%
def products(d, size, divisor=1.0):
    query = tf.cast(size * queries[d] / divisor, tf.float16)
    key = tf.cast(size * keys[d], tf.float16)
    return tf.matmul(query, key, transpose_b=True)


for d in largest:
    limit = float(FLOAT16.max / largest[d]) ** 0.5
    for size in (0.9 * limit, 1.1 * limit):
        logits = products(d, size)
        infinite = int(tf.math.count_nonzero(tf.math.is_inf(logits)))
        divided = products(d, size, divisor=d**0.5)
        print(
            f"d = {d}, size {size:.1f}: {infinite} of {TOKENS**2} are inf; "
            f"divided before, at most {float(tf.reduce_max(abs(divided))):.0f}"
        )
row = keras.ops.softmax(tf.constant([[0.0, 1.0, float("inf")]]))
print("softmax of [0, 1, inf]:", row.numpy())

# %% [markdown]
# A model that dies of this, and how it is found: `find_the_nan`. For numbers of
# your own, in a shell: `tfamp formats 3e-7 --scale=4096`.
