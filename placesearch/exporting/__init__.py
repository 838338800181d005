"""Found architectures as files for other programs."""
