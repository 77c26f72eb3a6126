"""Integer formats of weights and activations, and what they cost."""
