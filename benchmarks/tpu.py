"""Passes that TensorFlow gave to XLA, compiled for a TPU v5e; there is none.

    pip install '.[audit]'
    python -m benchmarks.tpu FILE.hlo ...

FILE.hlo is what `benchmarks.audits` keeps. The compiler of TPUs comes with
libtpu, through jax, and runs on any x86 host with Linux; what it makes is never
run. Of each file a line of JSON is printed, with the fields of `Compiled`, or
with the one field "error".
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

# Of which one core is compiled for.
TOPOLOGY = "v5e:2x2"

# Nothing asks the network what machine this is, and no other device is used.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[[^=]*? ([\w\-]+)\((.*)$"
)
_OPERAND = re.compile(r"(?:(\w+)\[[^\]]*\]\S* )?%([\w.\-]+)")
_PRODUCTS = ("dot", "convolution")
_HOST = re.compile(r'custom_call_target="([^"]*[Cc]allback[^"]*)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_SENT = ("infeed", "outfeed", "send", "recv")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a TPU's compiler made of a pass.

    Attributes:
        device: what it is for.
        versions: of jax and of libtpu.
        seconds: that it took.
        argument_bytes: weights, other variables and the batch.
        temporary_bytes: in the device's main memory; what fits into the 128
            MiB beside its cores is not there.
        code_bytes: of the program.
        operations: floating-point ones of a pass, as the compiler counts.
        products: matrix products and convolutions, by their operands' dtypes:
            "bf16 bf16".
        host: calls of the host, and what is sent there.
        wide: the names of products of which an operand is float32.
    """

    device: str
    versions: str
    seconds: float
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int
    operations: float
    products: dict[str, int]
    host: tuple[str, ...]
    wide: tuple[str, ...]


def read(text: str) -> dict[str, Any]:
    """`products`, `host` and `wide` of a compiled program, as in `Compiled`."""
    lines = [m for m in map(_OPERATION.match, text.splitlines()) if m]
    dtypes = {match[1]: match[2] for match in lines}
    products: dict[str, int] = collections.Counter()
    host = [match[3] for match in lines if match[3] in _SENT]
    wide = []
    for match in lines:
        host += _HOST.findall(match[4])
        if match[3] in _PRODUCTS:
            operands = _OPERAND.findall(match[4].split(")")[0])
            taken = [
                dtype or dtypes.get(name, "?") for dtype, name in operands[:2]
            ]
            products[" ".join(taken)] += 1
            if "f32" in taken:
                wide += _NAME.findall(match[4]) or ["?"]
    return {
        "products": dict(products),
        "host": tuple(host),
        "wide": tuple(wide),
    }


def compiled(program: bytes) -> Compiled:
    """Compiles a serialized HLO module for one core.

    Raises:
        ImportError: jax or libtpu is not here.
        RuntimeError: the compiler refuses the program.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGY
    )
    device = topology.devices[0]
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(
        xla_client.XlaComputation(program)
    )
    begin = time.perf_counter()
    with mlir.make_ir_context():
        executable = device.client.compile(
            ir.Module.parse(text),
            xla_client.DeviceList((device,)),
            compiler.get_compile_options(num_replicas=1, num_partitions=1),
        )
    seconds = time.perf_counter() - begin
    memory = executable.get_compiled_memory_stats()
    return Compiled(
        device=device.device_kind,
        versions=f"jax {jax.__version__}, libtpu {_libtpu_version()}",
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        operations=executable.cost_analysis()["flops"],
        **read(executable.hlo_modules()[0].to_string()),
    )


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")


def _described(path: str) -> dict[str, Any]:
    try:
        found = compiled(pathlib.Path(path).read_bytes())
    except (ImportError, RuntimeError, ValueError) as error:
        return {"error": " ".join(str(error).split())[:300]}
    return dataclasses.asdict(found)


def main(*paths: str) -> int:
    """Prints a line of JSON for each file; 1 where one does not compile."""
    status = 0
    for path in paths:
        described = _described(path)
        status = max(status, "error" in described)
        print(json.dumps({"file": path} | described), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
