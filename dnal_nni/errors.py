"""The one exception that a user's mistake can cause."""


class DNALError(Exception):
    """What was wrong, where (layer name and value), and what to do about it."""
