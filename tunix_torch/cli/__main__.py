"""`python -m tunix_torch.cli`: the command `tunix-torch`, where the package is not installed."""

from .command import main

if __name__ == "__main__":
    main()
