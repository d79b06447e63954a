"""Files: found, checked, read, written, journalled; no models."""
