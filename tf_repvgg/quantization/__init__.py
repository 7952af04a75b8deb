"""Number formats for weights and the methods that put weights on them."""
