"""Sums that TensorFlow's kernels make in 16 bits, made in float32."""
