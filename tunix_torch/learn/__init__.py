"""Learning from a batch: passes, log-probabilities, the learning step, supervised fine-tuning, a step's numbers."""
