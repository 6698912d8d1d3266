"""The contents of a model, and the code that reads the weights of its layers."""
