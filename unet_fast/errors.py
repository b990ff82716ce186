"""The error that a user's own mistake raises."""


class UserError(ValueError):
    """A mistake of the caller's that one line explains: what was expected, what came, what to do.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary `ValueError`.

    >>> from unet_fast.errors import UserError
    >>> isinstance(UserError("expected a folder, got 'x.tif'; give the folder that holds it"), ValueError)
    True
    """

    # With any other one TensorFlow's AutoGraph raises an error of its own type, where this comes from a traced function.
    __init__ = Exception.__init__
