"""Measurements: what makes and times the jobs whose figures are quoted. Nothing here is imported by the library."""
