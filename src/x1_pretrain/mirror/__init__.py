"""Copies of a run off its machine: one writer, checkpoints that appear whole, a way back. No torch."""
