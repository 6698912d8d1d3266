"""The jobs that the command line runs."""
