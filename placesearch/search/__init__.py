"""What to try next, and where trials are kept."""
