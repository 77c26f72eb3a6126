"""planish.passes."""
