"""minislm: text classification in one forward pass of a small language model.
What a user gives that is wrong raises ValueError, which names the value and the remedy."""

from .data import Task
from .methods import METHODS, Classifier
from .weights import load_backbone

__version__ = "0.1.0"
__all__ = ["METHODS", "Classifier", "Task", "load_backbone"]
