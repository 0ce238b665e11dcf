"""`dalle-ds bench NAME`: run one benchmark and print its table."""

from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

from dalle_ds.bench.harness.settings import MachineBenchConfig
from dalle_ds.console import Outcome


def run(settings: MachineBenchConfig) -> Outcome:
    """Run the benchmark that `settings` belongs to. The outcome holds its summary and its table."""
    report = import_module(settings.module).run(settings)
    with redirect_stdout(StringIO()) as table:
        report.print_table(to_stderr=False)
    return Outcome(report.summary(), text=table.getvalue().rstrip())
