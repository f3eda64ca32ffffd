"""What is known about machines, and predictions made from it: pure functions, no device and no process group."""

from odysseus_kernels.planner.cost_model import MEASURED_MARGIN, MODEL_MARGIN, MODES, Work, pick_mode, predict
from odysseus_kernels.planner.hardware import CPU, GENERIC_GPU, KNOWN_GPUS, Hardware, hardware_for

__all__ = [
    "CPU",
    "GENERIC_GPU",
    "KNOWN_GPUS",
    "MEASURED_MARGIN",
    "MODEL_MARGIN",
    "MODES",
    "Hardware",
    "Work",
    "hardware_for",
    "pick_mode",
    "predict",
]
