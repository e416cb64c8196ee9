"""The one exception that is the user's to mend: one sentence saying what is wrong, where, and what to do."""


class UserError(ValueError):
    """Bad input.  The command line prints it and exits with 2; a node shows it as its error."""
