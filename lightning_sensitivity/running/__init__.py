"""Run any model on any batch: its arguments and outputs, noise, and passes that leave no trace."""

from lightning_sensitivity.running.call import ModelCall, select_outputs, select_targets
from lightning_sensitivity.running.isolation import isolated
from lightning_sensitivity.running.perturbation import GaussianNoise, Noise, noise_generator

__all__ = ["GaussianNoise", "ModelCall", "Noise", "isolated", "noise_generator", "select_outputs", "select_targets"]
