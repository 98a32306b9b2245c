"""Where other packages document the names that this documentation links to: a build has no network to look them up."""

import zlib
from pathlib import Path

PYTHON = "https://docs.python.org/3/"
TORCH = "https://docs.pytorch.org/docs/stable/"
TORCHMETRICS = "https://lightning.ai/docs/torchmetrics/stable/"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable/"

# A name, the role that it has in Sphinx, and its page; $ stands for the name.
NAMES = {
    PYTHON: """
        bool             class  library/functions.html#bool
        float            class  library/functions.html#float
        int              class  library/functions.html#int
        property         class  library/functions.html#property
        object           class  library/functions.html#object
        dict             class  library/stdtypes.html#dict
        list             class  library/stdtypes.html#list
        str              class  library/stdtypes.html#str
        tuple            class  library/stdtypes.html#tuple
        None             data   library/constants.html#None
        RuntimeError     exception  library/exceptions.html#RuntimeError
        TypeError        exception  library/exceptions.html#TypeError
        ValueError       exception  library/exceptions.html#ValueError
        typing.Any       data   library/typing.html#typing.Any
        typing.NamedTuple class library/typing.html#typing.NamedTuple
        collections.abc.Callable class library/collections.abc.html#$
        collections.abc.Iterable class library/collections.abc.html#$
        collections.abc.Iterator class library/collections.abc.html#$
        collections.abc.Mapping  class library/collections.abc.html#$
        collections.abc.Sequence class library/collections.abc.html#$
        contextlib.AbstractContextManager class library/contextlib.html#$
    """,
    TORCH: """
        torch.Generator  class  generated/$.html#$
        torch.Tensor     class  tensors.html#$
        torch.device     class  tensor_attributes.html#$
        torch.func.functional_call function generated/$.html#$
        torch.nn.Module  class  generated/$.html#$
        torch.optim.lr_scheduler.ReduceLROnPlateau class generated/$.html#$
        torch.utils.data.DataLoader class data.html#$
        torch.utils.data.IterableDataset class data.html#$
    """,
    TORCHMETRICS: """
        torchmetrics.Metric class api-reference/metric
    """,
    LIGHTNING: """
        lightning.pytorch.callbacks.Callback                class  optional-api/api/$
        lightning.pytorch.callbacks.EarlyStopping           class  optional-api/api/$
        lightning.pytorch.callbacks.EMAWeightAveraging      class  optional-api/api/$
        lightning.pytorch.callbacks.ModelCheckpoint         class  optional-api/api/$
        lightning.pytorch.callbacks.WeightAveraging         class  optional-api/api/$
        lightning.pytorch.cli.LightningCLI                  class  optional-api/api/$
        lightning.pytorch.core.LightningModule              class  optional-api/api/$
        lightning.pytorch.trainer.trainer.Trainer           class  optional-api/api/$
    """,
}

# Names by which docstrings and annotations know them, too.
ALIASES = {
    "Tensor": "torch.Tensor",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torchmetrics.metric.Metric": "torchmetrics.Metric",
    "lightning.pytorch.core.module.LightningModule": "lightning.pytorch.core.LightningModule",
    "lightning.pytorch.LightningModule": "lightning.pytorch.core.LightningModule",
    "lightning.pytorch.Trainer": "lightning.pytorch.trainer.trainer.Trainer",
}


def entries(url: str) -> dict[str, tuple[str, str]]:
    """Return the role and the page of each name of a package, by name."""
    lines = [line.split() for line in NAMES[url].strip().splitlines()]
    found = {name: (role, page.replace("$", name)) for name, role, page in lines}
    return found | {alias: found[name] for alias, name in ALIASES.items() if name in found}


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory in Sphinx's format for each package; return what `intersphinx_mapping` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    urls = {"Python": PYTHON, "PyTorch": TORCH, "TorchMetrics": TORCHMETRICS, "Lightning": LIGHTNING}
    for package, url in urls.items():
        head = f"# Sphinx inventory version 2\n# Project: {package}\n# Version: \n# zlib\n"
        lines = [f"{name} py:{role} 1 {page} -\n" for name, (role, page) in entries(url).items()]
        path = folder / f"{package}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        mapping[package.lower()] = (url, str(path))
    return mapping


def short_names() -> dict[str, str]:
    """Return the full names of the classes that pages mention by their last part, such as `Trainer`."""
    full = [name for url in (TORCH, LIGHTNING) for name in entries(url) if name not in ALIASES]
    return {name.rsplit(".", 1)[-1]: name for name in full if name.rsplit(".", 1)[-1][0].isupper()}
