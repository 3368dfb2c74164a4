"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Draw training and validation loss of a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in (("lm_loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
