"""Whether a trained model is as good in what other hardware computes in."""
