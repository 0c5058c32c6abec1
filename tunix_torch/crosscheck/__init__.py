"""The same batch through Google's Tunix on JAX and through this library: `python -m crosscheck`."""
