"""A small model of training labels, checked and calibrated on labels that it has not seen."""
