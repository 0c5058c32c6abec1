"""Plan a training job for a TPU slice without a TPU: its graphs are compiled by the TPU's own compiler, libtpu."""
