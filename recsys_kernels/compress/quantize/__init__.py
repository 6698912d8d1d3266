"""What quantization needs to know of activations."""
