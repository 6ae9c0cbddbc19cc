"""One step of training or evaluation on a replica's share of the batch."""
