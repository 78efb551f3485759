"""What makes a training fast on the hardware at hand and changes nothing of what is learned."""
