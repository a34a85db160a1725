"""The ratios of a report as a bar chart."""

from __future__ import annotations

import pathlib
from typing import Any

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # told apart by colour-blind readers
_GROUP = 0.8  # of the distance between layers that their bars fill


def save_plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG: a group of bars for each layer, how many times faster than each baseline ours is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = report["layers"]
    means = {name: each["geometric_mean"] for name, each in report["summary"].items() if "geometric_mean" in each}
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.12 * len(layers) * (len(means) + 1.5)), layout="constrained")
    thickness = _GROUP / max(1, len(means))
    for place, (name, mean) in enumerate(means.items()):
        ratios = [layer["implementations"][name].get("ratio", 0) for layer in layers]
        offsets = [row + (place + 0.5) * thickness - _GROUP / 2 for row in range(len(layers))]
        color = _COLORS[place % len(_COLORS)]
        axes.barh(offsets, ratios, thickness, color=color, label=f"{name} (geo-mean {mean:.2f})")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(layers)), [f"{layer['name']} ({layer['times']})" for layer in layers])
    axes.invert_yaxis()
    axes.set_xlabel("time of the baseline / time of fusedconvbn")
    settings = report["settings"]
    axes.set_title(
        f"{settings['what']}: {settings['mode']}, batch {settings['batch']}, {settings['dtype']}, "
        f"{settings['threads']} thread(s)\n{report['machine'].get('gpu') or report['machine']['cpu']}",
        fontsize="medium",
    )
    if means:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
