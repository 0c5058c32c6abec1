"""`python -m tunix_torch.export`: merges an adapter into its base model, see `run/export.py`."""

from .run.export import main

if __name__ == "__main__":
    main()
