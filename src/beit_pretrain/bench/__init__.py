"""What is measured about this project."""
