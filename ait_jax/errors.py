"""The one kind of error that is the user's to mend: programs print it without a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Names the key or file, the value, and what is allowed."""
