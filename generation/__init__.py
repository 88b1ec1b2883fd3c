"""Prompts to candidates."""
