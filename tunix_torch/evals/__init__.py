"""Answering evaluation questions: sampling and judging, pass@k with intervals, results on disk."""
