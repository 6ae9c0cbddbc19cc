"""What an export came to."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """A file that was written, loaded and run.

    Attributes:
        path: of the file, or of a SavedModel's folder.
        format: "saved_model", "litert", "onnx" or "keras".
        precision: that it was traced in.
        quantize: None, "float16", "int8", "int4" or "gptq".
        is_static: whether activations are quantized by a calibration.
        runtime: what ran it, and its version.
        bytes: of the file, or of all files of the folder.
        inputs: names, dtypes and shapes; None stands for any size.
        outputs: likewise, as they came.
        rows: how many it was compared on.
        batch: "given", or "random": normal floats and small ids.
        largest_difference: to the model in float32, of any element of its
            outputs.
        relative_difference: the same by the largest magnitude of the output,
            or by 1 where that is less. At most the tolerance.
        tolerance: None where there was none.
        same_choice: the share of rows whose largest output is the same as in
            float32; None for outputs without a choice.
        quantized_share: the share of the weights that are stored in fewer
            bits than float32; None without `quantize`.
        float_layers: those that were left in float.
    """

    path: str
    format: str
    precision: str
    quantize: str | None
    is_static: bool
    runtime: str
    bytes: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    rows: int
    batch: str
    largest_difference: float
    relative_difference: float
    tolerance: float | None
    same_choice: float | None
    quantized_share: float | None
    float_layers: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The report as JSON has it, in an export.json too."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line."""
        what = self.precision if self.quantize is None else self.quantize
        if self.is_static:
            what += " static"
        parts = [
            f"{self.path}: {self.format} in {what}, {self.bytes:,} bytes",
            f"largest difference to float32 {self.largest_difference:.2g}",
        ]
        if self.quantized_share is not None:
            parts.append(f"{self.quantized_share:.0%} of the weights quantized")
        return "; ".join([*parts, f"ran in {self.runtime}"])
