"""A training step beside itself in float32: where error is made."""
