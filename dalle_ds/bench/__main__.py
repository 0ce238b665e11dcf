"""`python -m dalle_ds.bench NAME`: the same as `dalle-ds bench NAME`."""

from dalle_ds.bench.verbs import bench
from dalle_ds.console import setup_logging, user_errors_exit


@user_errors_exit
def main() -> None:
    """Entry point."""
    setup_logging()
    bench(prog_name="python -m dalle_ds.bench")


if __name__ == "__main__":
    main()
