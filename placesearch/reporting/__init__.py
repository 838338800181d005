"""Tables and texts that say what a study found."""
