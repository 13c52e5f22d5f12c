"""What is loaded and saved."""
