"""A step that was skipped: what it was, who was first, what the scale did."""
