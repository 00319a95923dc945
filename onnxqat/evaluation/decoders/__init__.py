"""Decoders: compute boxes from a detector's raw outputs, as the detector's own package does."""

from onnxqat.evaluation.decoders.detector import Detector, input_size
from onnxqat.evaluation.decoders.found import DECODERS, decoder_of, read_decoder
from onnxqat.evaluation.decoders.suppression import Detections

__all__ = ["DECODERS", "Detections", "Detector", "decoder_of", "input_size", "read_decoder"]
