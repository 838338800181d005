"""Data sets and the brief training of candidates."""
