"""Errors that the user can fix, as opposed to bugs."""


class UserError(ValueError):
    """What a user gave cannot work: a config, a file, an argument.

    Its message is one line that names the key, or the file and line, and says what would be right. Commands print that
    line without a traceback (`lingua.launch.run_main`). Any other exception, a plain ValueError too, is a bug.
    """
