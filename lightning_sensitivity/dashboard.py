"""The layout of TensorBoard's Custom Scalars page."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_sensitivity.readings import LOG10, RISK

__all__ = ["custom_scalars_layout"]


def custom_scalars_layout(prefixes: Mapping[str, bool]) -> dict[str, dict[str, list[object]]]:
    """Charts that put together what is read together, for ``SummaryWriter.add_custom_scalars``.

    Args:
        prefixes: The ``prefix`` of each monitor, and whether it estimates the risk; a category of charts is made for
            each.

    Returns:
        Category to chart title to ``["Multiline", [regular expressions of tags]]``.
    """
    layout: dict[str, dict[str, list[object]]] = {}
    for prefix, has_risk in prefixes.items():
        tag = re.escape(prefix)
        loader = r"(/dataloader_idx_\d+)?$"
        site = r"(/.+)?$"  # a submodule, a loader or both
        risk: dict[str, list[object]] = {
            "risk estimate and its terms": ["Multiline", [f"^{tag}({'|'.join(RISK.values())}){loader}"]]
        }
        layout[f"Generalization ({prefix}*)"] = (risk if has_risk else {}) | {
            # Whatever the user's loss is called, it has "loss" in its name; the estimate has, too.
            "loss and loss estimate": ["Multiline", [f"^{tag}.*loss"]],
            "sensitivity, log10": ["Multiline", [f"^{tag}{LOG10}{site}"]],
        }
    return layout
