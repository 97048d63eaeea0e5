"""What other servers need to serve a bundle."""
