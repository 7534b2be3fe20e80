"""Files that appear whole: cut networks, and the state of work under way."""
