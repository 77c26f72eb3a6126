"""Bundles: a compiled model as a C library with its weights and a self-check, for other machines."""
