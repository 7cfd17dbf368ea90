"""minislm: text classification in one forward pass of a small language model."""

from .data import Task
from .methods import METHODS, Classifier
from .weights import load_backbone

__version__ = "0.1.0"
__all__ = ["METHODS", "Classifier", "Task", "load_backbone"]
