"""Names of the metrics in tables, curves and reports."""

from collections.abc import Mapping

METRIC_LABELS = {
    "image_auroc": "image AUROC",
    "image_auroc_log": "image AUROC (log)",
    "image_auroc_absolute": "image AUROC (absolute)",
    "pixel_auroc": "pixel AUROC",
    "pixel_auroc_absolute": "pixel AUROC (absolute)",
    "pixel_f1": "pixel F1-max",
    "aupro": "AUPRO",
    "aupro_published": "AUPRO (published)",
    "aupro_log": "AUPRO (log map)",
    "false_alarm_rate": "false-alarm rate",
    "recall": "recall",
    "f1": "F1",
}


def labeled(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns ``metrics`` by their labels."""
    return {METRIC_LABELS[name]: value for name, value in metrics.items()}
