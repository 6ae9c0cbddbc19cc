"""The table of `tfamp portability`."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.exported.tables import interval, number, share
from tfamp.analysis.page.part import Table


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Each device, its precision, and what that does to the model."""
    return [
        Table(
            f"Computed as each device would, on {record['examples']} examples",
            (
                "device",
                "precision",
                record["metric"] or "metric",
                f"difference, {1 - 2 * record['alpha']:.0%} interval",
                "largest difference",
                "same choice",
                "verdict",
            ),
            [
                (
                    row["device"],
                    row["precision"],
                    number(row["metric"]),
                    interval(row["interval"]),
                    number(row["largest_difference"], digits=2),
                    share(row["same_choice"]),
                    row["verdict"]
                    + (f": {row['reason']}" if row["reason"] else ""),
                )
                for row in record["devices"]
            ],
        )
    ]
