"""Candidates to ranked."""
