"""Compare runs by what they have logged to TensorBoard already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_sensitivity.comparison.scores import ModelScores
from lightning_sensitivity.comparison.table import Comparison


def compare_runs(
    log_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    prefix: str = "val_",
    loss: str | None = "val_loss",
    error: str | None = None,
) -> Comparison:
    """Compare finished runs by the last values that :class:`~lightning_sensitivity.SensitivityMonitor` logged.

    Nothing is run. Each run had its own samples of noise and maybe of data, so that two of them are compared less
    sharply than with :func:`~lightning_sensitivity.compare_models`.

    Args:
        log_dirs: A folder of TensorBoard logs, or several. Each folder below it that holds an event file is a run.
        prefix: That of the monitor.
        loss: Tag of the true loss in the same logs; None, or one that no run has, leaves it out.
        error: Tag of the share of wrong predictions.

    Returns:
        The comparison, from the least to the most sensitive run.

    Raises:
        ValueError: If no run under ``log_dirs`` has logged a sensitivity, with the tags that there are.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from lightning_sensitivity import compare_runs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, sensitivity, loss in (("small", 0.1, 0.5), ("large", 0.4, 0.9)):
        ...         with SummaryWriter(Path(folder, name)) as writer:
        ...             writer.add_scalar("val_sensitivity", sensitivity, 1)
        ...             writer.add_scalar("val_loss", loss, 1)
        ...     result = compare_runs(folder)
        >>> [(run.name, round(run.sensitivity, 3), round(run.loss, 3)) for run in result]
        [('small', 0.1, 0.5), ('large', 0.4, 0.9)]
    """
    roots = [log_dirs] if isinstance(log_dirs, str | os.PathLike) else list(log_dirs)
    folders = sorted({path.parent.absolute() for root in roots for path in Path(root).rglob("*tfevents*")})
    fields = {prefix + field: field for field in ("sensitivity", "sensitivity_stderr", "loss_estimate")}
    fields |= {tag: field for tag, field in ((loss, "loss"), (error, "error")) if tag is not None}
    last = {folder: _last_values(folder) for folder in folders}
    common = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    rows = []
    for folder, values in last.items():
        if prefix + "sensitivity" in values:
            known = {field: values[tag] for tag, field in fields.items() if tag in values}
            rows.append(ModelScores(folder.relative_to(common).as_posix(), **known))  # type: ignore[arg-type]
    if not rows:
        tags = sorted(set().union(*last.values()))
        raise ValueError(
            f"Expected `log_dirs` to hold runs that logged {prefix + 'sensitivity'!r} (see `prefix`), but got"
            f" {len(folders)} with the tags {tags} in {', '.join(map(str, roots))}."
        )
    return Comparison(rows)


def _last_values(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()[SCALARS]}
