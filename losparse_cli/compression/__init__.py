"""The rooms of `losparse compress`: what is fixed before a weight is read, and how layers and blocks are solved."""
