"""The description of a run on its page in MLflow."""

from collections.abc import Mapping

from distrain.track.origin import DataSource, Origin

_QUALITIES = {
    "val/top1": "top-1 {:.2%}",
    "val/top5": "top-5 {:.2%}",
    "val/mAP": "mAP {:.2%}",
    "val/loss": "validation loss {:.4f}",
}
_MOST_CHARACTERS = 4000  # of settings; MLflow takes 5000 in all


def describe(network: str, origin: Origin, status: str, step: int, newest: Mapping[str, float]) -> str:
    """Markdown: how far the run is and with which result, on what it runs, and its settings.

    `status`: of MLflow; `newest`: the newest value of each metric.
    """
    qualities = [text.format(newest[name]) for name, text in _QUALITIES.items() if name in newest]
    shown = {"SCHEDULED": "stopped, to be resumed"}.get(status, status.lower())
    tags = origin.tags
    ranks = tags.get("distrain.ranks", "1")
    return "\n".join(
        [
            f"**{network}**: {', '.join([shown, f'step {step:,}', *qualities])}",
            "",
            *(f"- {_data(one)}" for one in origin.data),
            f"- {tags.get('distrain.strategy', '')}, {ranks} rank{'s' * (ranks != '1')} on "
            f"{tags.get('distrain.hosts', '')} ({tags.get('distrain.device', '')})"[:400],
            "",
            "Settings that differ from the defaults:",
            "",
            "```",
            *_settings(origin),
            "```",
        ]
    )


def _data(one: DataSource) -> str:
    return f"{one.samples:,} images of {one.classes:,} classes for {one.use}: {one.uri[-200:]} ({one.digest[:12]})"


def _settings(origin: Origin) -> list[str]:
    lines = [f"{key}={value}"[:300] for key, value in origin.settings.items()]
    kept, size = 0, 0
    while kept < len(lines) and (size := size + len(lines[kept]) + 1) <= _MOST_CHARACTERS:
        kept += 1
    return lines if kept == len(lines) else [*lines[:kept], f"and {len(lines) - kept} more, in config.yaml"]
