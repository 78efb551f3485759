"""Fast training on the hardware at hand, without a change in what is learned."""
