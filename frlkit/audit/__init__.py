"""Can a robust error be trusted? Reasons to doubt it, and a ladder of ever stronger attacks."""
