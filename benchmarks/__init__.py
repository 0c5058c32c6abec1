"""Programs that measure speed, memory and accuracy, for the figures in README.md. The library imports nothing of it."""
