"""Networks in Flax Linen, the convolution they use, and adapters for other libraries."""
