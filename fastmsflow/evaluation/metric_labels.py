"""Names of the metrics in tables, curves and reports."""

from collections.abc import Mapping

METRIC_LABELS = {
    "image_auroc": "image AUROC",
    "image_auroc_log": "image AUROC (log)",
    "image_auroc_absolute": "image AUROC (absolute)",
    "pixel_auroc": "pixel AUROC",
    "pixel_auroc_absolute": "pixel AUROC (absolute)",
    "pixel_f1": "pixel F1-max",
    "seg_f1_max": "SegF1-max (chosen on test)",
    "aupro": "AUPRO",
    "aupro_05": "AUPRO to 0.05",
    "aupro_absolute": "AUPRO (absolute)",
    "aupro_absolute_05": "AUPRO to 0.05 (absolute)",
    "aupro_published": "AUPRO (published)",
    "aupro_log": "AUPRO (log map)",
    "seg_f1": "SegF1 (pixel threshold)",
    "pixel_fpr": "pixel false-positive rate",
    "false_pixel_rate": "false pixels, good images",
    "false_alarm_rate": "false-alarm rate",
    "recall": "image recall",
    "f1": "image F1",
}


def labeled(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns ``metrics`` by their labels."""
    return {METRIC_LABELS[name]: value for name, value in metrics.items()}
