"""What any run needs and no paper mentions."""
