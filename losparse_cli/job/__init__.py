"""One compression: everything that is fixed before a weight is read, and how one layer is solved."""
