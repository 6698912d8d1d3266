"""What a model holds, and what reads the weights of its layers."""
