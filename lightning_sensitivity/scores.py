"""What a comparison knows of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ModelScores"]


@dataclass(frozen=True)
class ModelScores:
    """The row of one model. A number that has no meaning for it is nan.

    Attributes:
        name: What the user calls it.
        sensitivity: S, in squared units of the outputs.
        sensitivity_stderr: One standard error of S, over samples and noise.
        loss_estimate: Equation 9, in nats.
        variance: C · E‖p(x + ε) − p(x)‖², the variance term of the Brier score; in a regression, of the squared error.
        entropy: Mean entropy of the predictions, in nats.
        confidence: Mean probability of the predicted class.
        flips: Share of predictions that the noise changes.
        shift_loss: Expected loss, if labels were drawn from the model's own predictions for moved images.
        shift_error: Expected share of wrong predictions, in the same way.
        consensus_loss: Expected loss, if labels were drawn from the mean prediction of the other models; see
            :func:`~lightning_sensitivity.consensus.consensus_scores`.
        consensus_error: Expected share of wrong predictions, in the same way.
        num_parameters: How many parameters it has.
        seconds: Time of the whole pass, with loading.
        loss: The true loss: cross-entropy, in a regression the mean squared error.
        error: The true share of wrong predictions.
        note: What else there is to say: that it is untrained, or why it failed.
    """

    name: str
    sensitivity: float = math.nan
    sensitivity_stderr: float = math.nan
    loss_estimate: float = math.nan
    variance: float = math.nan
    entropy: float = math.nan
    confidence: float = math.nan
    flips: float = math.nan
    shift_loss: float = math.nan
    shift_error: float = math.nan
    consensus_loss: float = math.nan
    consensus_error: float = math.nan
    num_parameters: float = math.nan
    seconds: float = math.nan
    loss: float = math.nan
    error: float = math.nan
    note: str = ""
