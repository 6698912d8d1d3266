"""What linear layers with int8 and with pruned weights share."""
