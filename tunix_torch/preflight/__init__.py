"""Plan a job for a TPU without a TPU: its own graphs, compiled by the TPU's compiler. See `plan_tpu.py`."""
