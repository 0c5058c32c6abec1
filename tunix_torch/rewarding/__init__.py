"""Calling reward functions and judges: their columns, time limits and worker processes."""
