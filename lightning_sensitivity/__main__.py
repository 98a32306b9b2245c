"""The shell's commands: ``python -m lightning_sensitivity compare`` and ``compare_runs``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from lightning_sensitivity.comparison import Comparison, compare_models, compare_runs
from lightning_sensitivity.comparison.models import QUIET

# What of the Trainer matters to a pass over validation samples.
_TRAINER = {"accelerator", "precision", "limit_val_batches", "enable_progress_bar"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Instead of those of the shell.
    """
    if find_spec("jsonargparse") is None or find_spec("typeshed_client") is None:
        raise SystemExit("The command needs jsonargparse: `pip install 'jsonargparse[signatures]'`.")
    from jsonargparse import ArgumentParser

    compare = ArgumentParser(description="Compare checkpoints on the validation samples of a data module.")
    compare.add_argument("--config", action="config", help="YAML file with these options")
    compare.add_argument("checkpoints", nargs="+", type=str, help="Lightning checkpoints, of one `model_class`")
    compare.add_subclass_arguments(LightningDataModule, "data", required=True)
    compare.add_function_arguments(compare_models, skip={"models", "dataloader", "trainer"})
    skip = inspect.signature(Trainer).parameters.keys() - _TRAINER
    compare.add_class_arguments(Trainer, "trainer", skip=set(skip), instantiate=False)

    runs = ArgumentParser(description="Compare finished runs by what SensitivityMonitor logged to TensorBoard.")
    runs.add_argument("log_dirs", nargs="+", type=str, help="folders of TensorBoard logs; runs are found below them")
    runs.add_function_arguments(compare_runs, skip={"log_dirs"})

    parser = ArgumentParser(prog="python -m lightning_sensitivity", description="Compare models without labels.")
    subcommands = parser.add_subcommands()
    for name, command in (("compare", compare), ("compare_runs", runs)):
        command.add_argument("--csv", type=str, help="where to write the table")
        command.add_argument("--figure", type=str, help="where to draw (.png, .pdf, .svg; needs matplotlib)")
        subcommands.add_subcommand(name, command)

    parsed = parser.parse_args(arguments)
    # Of the two names the older one is deprecated, and the newer one not known to older versions.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    options: dict[str, Any] = instantiate(parsed)[parsed.subcommand].as_dict()
    csv, figure = options.pop("csv"), options.pop("figure")
    if figure and find_spec("matplotlib") is None:
        raise SystemExit("`--figure` needs matplotlib: `pip install matplotlib`.")
    if parsed.subcommand == "compare":
        del options["config"]
        trainer, models = Trainer(**options.pop("trainer"), **QUIET), _named(options.pop("checkpoints"))
        _show(compare_models(models, options.pop("data"), trainer=trainer, **options), csv, figure)
    else:
        _show(compare_runs(**options), csv, figure)


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Paths under names as short as they can be: without the folders that all share, and without the suffix."""
    files = [Path(path).absolute() for path in dict.fromkeys(paths)]
    common = os.path.commonpath([file.parent for file in files])
    names = [file.relative_to(common).as_posix().removesuffix(".ckpt") for file in files]
    return {name if names.count(name) == 1 else str(file): str(file) for name, file in zip(names, files, strict=True)}


def _show(comparison: Comparison, csv: str | None, figure: str | None) -> None:
    print(comparison)
    if csv:
        comparison.to_csv(csv)
    if figure:
        Path(figure).parent.mkdir(parents=True, exist_ok=True)
        comparison.plot()[0].savefig(figure, dpi=150)


if __name__ == "__main__":
    main()
