"""The names of a training step's graphs, in the order in which they run."""

PREFILL = "prefill"
DECODE = "decode"
REFERENCE = "reference log-probabilities"
OLD = "old log-probabilities"
LEARN = "learn"
OPTIMIZER = "optimizer"
