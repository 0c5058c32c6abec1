"""Every setting, once: fields with their help, aliases, checks, and how settings are kept with a run."""
