"""`dalle-ds accept`: acceptance test of a GPU node, step by step: every code path that behaves differently on a GPU."""

from dalle_ds.acceptance.report import table
from dalle_ds.acceptance.run import accept
from dalle_ds.commands.settings import AcceptConfig
from dalle_ds.console import Outcome


def run(config: AcceptConfig) -> Outcome:
    names, again = ([name for name in (value or "").split(",") if name] for value in (config.steps, config.again))
    summary = accept(config.out, rehearse=config.rehearse, minutes=config.minutes, names=names, again=again)
    return Outcome(summary, summary["ok"], text=table(summary))
