"""What can be set: flags, the command line and YAML files, stages, weights of loss terms. No torch."""

from training.config.config import Config as Config
from training.config.config import make_config as make_config
