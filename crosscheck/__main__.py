"""`python -m crosscheck`: the cross-check of `tunix_torch.crosscheck`, as a command."""

from tunix_torch.crosscheck.__main__ import main

if __name__ == "__main__":
    main()
