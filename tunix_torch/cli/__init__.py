"""The command `tunix-torch` and what stands behind the scripts at the root: flags, one-line errors, exit codes."""
