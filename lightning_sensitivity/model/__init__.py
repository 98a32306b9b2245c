"""Run any model on any batch: its arguments and outputs, noise, twins, and passes that leave no trace."""

from lightning_sensitivity.model.call import (
    ModelCall,
    clone_tensors,
    join_calls,
    select_outputs,
    select_targets,
    tensors_in,
)
from lightning_sensitivity.model.isolation import (
    RunIsolated,
    changed_names,
    fingerprint,
    isolated,
    parameter_versions,
    written_parameters,
)
from lightning_sensitivity.model.noise import (
    GaussianNoise,
    Noise,
    NoiseFunction,
    check_noise,
    noise_generator,
    noisy_outputs,
    submodule,
)
from lightning_sensitivity.model.twins import (
    batch_statistics,
    copy_weights,
    has_batch_norm,
    twin_weights,
    unknown_parameters,
)

__all__ = [
    "GaussianNoise",
    "ModelCall",
    "Noise",
    "NoiseFunction",
    "RunIsolated",
    "batch_statistics",
    "changed_names",
    "check_noise",
    "clone_tensors",
    "copy_weights",
    "fingerprint",
    "has_batch_norm",
    "isolated",
    "join_calls",
    "noise_generator",
    "noisy_outputs",
    "parameter_versions",
    "select_outputs",
    "select_targets",
    "submodule",
    "tensors_in",
    "twin_weights",
    "unknown_parameters",
    "written_parameters",
]
