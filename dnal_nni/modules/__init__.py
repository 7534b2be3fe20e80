"""What a layer is; running somebody's model; gates; supernets."""
