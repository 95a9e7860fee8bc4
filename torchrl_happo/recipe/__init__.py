"""The parts of the training recipe; :mod:`torchrl_happo.train` puts them together."""
