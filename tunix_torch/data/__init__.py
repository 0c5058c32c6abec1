"""Questions: from files and hubs to rows, and from rows to prompts of tokens."""
