"""A score as lines of text."""

from dalle_ds.scenes.score import Report, Share


def table(report: Report, reconstructed: Report | None = None) -> str:
    """A line for each split and category, the mean below, then the faults.

    Args:
        reconstructed: scores of real scenes that went through a dVAE. They give a further column.
    """
    head = f"{'split':<10}{'category':<19}{'right':>6}  {'95% interval':<15}{'images':>7}{'captions':>10}{'chance':>8}"
    lines = [head + (f"{'reconstructed':>15}" if reconstructed else "")]
    for split, mean in report.means.items():
        real = {}
        if reconstructed is not None and split in reconstructed.rows:
            real = {**reconstructed.rows[split], "mean": reconstructed.means[split]}
        for name, share in {**report.rows[split], "mean": mean}.items():
            lines.append(f"{split.replace('_', '-'):<10}{name.replace('_', ' '):<19}{_cells(share)}{_real(real.get(name))}")
        faults = ", ".join(f"{fault} {share:.1%}" for fault, share in report.faults[split].items())
        lines += [f"{split.replace('_', '-')} images with a fault: {faults or 'none'}", ""]
    return "\n".join(lines).rstrip()


def _cells(share: Share) -> str:
    interval = f"{share.low:.2f} to {share.high:.2f}"
    chance = "" if share.chance is None else f"{share.chance:.3f}"
    return f"{share.value:>6.3f}  {interval:<15}{share.n_images:>7}{share.n_captions:>10}{chance:>8}"


def _real(share: Share | None) -> str:
    return "" if share is None else f"{share.value:>15.3f}"
