"""Losses as pure functions of features: float32 in and out, products at the highest precision."""
