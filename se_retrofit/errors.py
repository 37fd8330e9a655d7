"""The one error that the package raises on purpose."""

__all__ = ["RetrofitError"]


class RetrofitError(ValueError):
    """Something about the model or the options makes the requested retrofit impossible.

    The message says what was given, what was expected and what to do. Whenever it is raised, the model that was
    given is as it was before the call.
    """
