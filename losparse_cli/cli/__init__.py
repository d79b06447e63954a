"""The terminal: signatures, tables, progress, and errors as sentences."""
