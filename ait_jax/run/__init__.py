"""A run seen from outside: its folder, what it leaves there, its start and its end."""
