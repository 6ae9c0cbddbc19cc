"""A worker's input: how much of it goes through the decoder."""

import pytest

from benchmarks import worker_input


@pytest.mark.slow
def test_only_sharded_workers_decode_their_part_alone(capsys):
    config = worker_input.Config(photographs=16, pixels=8, batch_size=8)

    rows = worker_input.measure(config)

    bytes_of = {
        (row["workers"], row["input"]): row["decoded_bytes"] for row in rows
    }
    (one,) = {bytes_of[workers, "decoded"] for workers in (1, 2, 4, 8)}
    assert one > 0
    for workers in (1, 2, 4, 8):
        assert bytes_of[workers, "tfamp.sharded"] * workers == one
    assert len(capsys.readouterr().out.splitlines()) == 10
