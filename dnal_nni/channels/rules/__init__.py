"""How channels pass through operations."""
