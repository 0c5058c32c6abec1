"""Evaluation: sampled answers to questions whose answers are known, pass@k with intervals, and results on disk."""
