"""What methods are made of: the registry of their parts, losses and phases as data."""
