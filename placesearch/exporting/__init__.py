"""Architectures for other programs: source code, programs, files."""
