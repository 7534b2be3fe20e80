"""Which channels go together."""
