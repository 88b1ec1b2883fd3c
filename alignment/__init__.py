"""Ranked to plan to checkpoint."""
