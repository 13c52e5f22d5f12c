"""What `diffusion-align doctor` says."""
