"""What must be settled before anything heavy is imported: the tests run on the CPU unless told otherwise."""

import os

os.environ.setdefault("TUNIX_DEVICE", "cpu")
