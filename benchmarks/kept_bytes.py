"""What a training step keeps from its forward to its backward pass.

    python -m benchmarks.kept_bytes --model=gpt4 --precision=mixed_bfloat16

The memory that a larger batch or a longer sequence costs is what the forward
pass leaves behind for the gradients. This counts it in the traced graph, where
every tensor has a shape and a dtype, and no allocator rounds: exactly, the
same on every machine, and without running a step. What grappler or XLA make of
the graph afterwards (rematerialization, fusion) is not in it.
"""

import argparse
import collections

import tfamp
from benchmarks.compare import cases, keras_networks
from tfamp.analysis.memory.kept import KeptBytes, kept_bytes

_MIB = 2**20
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def main() -> None:
    """Prints what a step of one of the compared models keeps."""
    named = {case.name: case for case in cases.FULL}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=named, default="resnet50")
    parser.add_argument(
        "--precision", choices=_PRECISIONS, default="mixed_bfloat16"
    )
    parser.add_argument("--optimize", action=argparse.BooleanOptionalAction)
    parser.add_argument("--largest", type=int, default=10)
    args = parser.parse_args()
    case = named[args.model]
    tfamp.set_precision(args.precision)
    model = keras_networks.build(case.network)
    if args.optimize:
        tfamp.optimize(model)
    model.compile(
        tfamp.wrap_optimizer(keras_networks.make_optimizer(case)),
        loss=keras_networks.make_loss(),
        auto_scale_loss=False,
    )
    kept = kept_bytes(model, *cases.make_batches(case)[0])
    print(f"{case.title}, {args.precision}, optimize: {bool(args.optimize)}")
    print(describe(kept, args.largest))


def describe(kept: KeptBytes, largest: int) -> str:
    """The sums, and the largest tensors, alike ones on one line."""
    lines = [
        f"{kept.total / _MIB:.1f} MiB kept from forward to backward",
        f"{kept.in_float32 / _MIB:.1f} MiB of it in float32",
        f"{kept.of_weights / _MIB:.1f} MiB of it copies of weights",
        f"{kept.num_casts} casts between floats",
    ]
    groups = collections.defaultdict(list)
    for each in kept.tensors:
        last = each.name.rpartition("/")[2].rstrip("0123456789").rstrip("_")
        groups[each.shape, each.dtype, last].append(each)
    sums = {
        key: sum(each.num_bytes for each in group)
        for key, group in groups.items()
    }
    for key in sorted(sums, key=sums.get, reverse=True)[:largest]:
        shape, dtype, _ = key
        lines.append(
            f"{sums[key] / _MIB:8.1f} MiB  {len(groups[key])} x {dtype}"
            f" {list(shape)}, such as {groups[key][0].name}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
