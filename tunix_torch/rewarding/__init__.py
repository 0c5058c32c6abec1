"""Scores completions: calls reward functions and judges with their columns, time limits and worker processes."""
