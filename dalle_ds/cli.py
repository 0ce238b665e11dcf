"""`dalle-ds VERB`: the entry point. The verbs are listed in `dalle_ds/commands/verbs.py`."""

from collections.abc import Sequence

import click

import dalle_ds
from dalle_ds.commands.verb import VerbGroup
from dalle_ds.commands.verbs import GROUPS, VERBS
from dalle_ds.console import setup_logging

app = VerbGroup(
    "dalle-ds",
    VERBS,
    "Train and use the original DALL-E: dVAE, sparse-transformer prior, sampling. `dalle-ds VERB --help` shows examples.",
    GROUPS,
)
click.version_option(dalle_ds.__version__, message="%(prog)s %(version)s")(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command given by `arguments`. If None, the arguments of the process are used."""
    setup_logging()
    app.main(args=None if arguments is None else list(arguments), prog_name="dalle-ds")


if __name__ == "__main__":
    main()
