"""The cross-check: the same batches through Google's Tunix on JAX, Hugging Face TRL and this library, compared.

`python -m crosscheck` runs it. Importing this package keeps JAX on the CPU, as that must happen before jax is imported.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
