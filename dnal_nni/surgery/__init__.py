"""Gates on, channels off, and the proof."""
