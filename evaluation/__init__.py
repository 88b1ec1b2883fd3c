"""Checkpoint to held-out figures."""
