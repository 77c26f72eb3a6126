"""planish.backends."""
