"""Names of other libraries and systems, translated into this library's settings."""
