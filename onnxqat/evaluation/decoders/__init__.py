"""Decoders: from the raw outputs of a detector to boxes, as the package it comes from does it."""

from onnxqat.evaluation.decoders.detector import Detector, input_size
from onnxqat.evaluation.decoders.found import DECODERS, decoder_of, read_decoder
from onnxqat.evaluation.decoders.suppression import Detections

__all__ = ["DECODERS", "Detections", "Detector", "decoder_of", "input_size", "read_decoder"]
