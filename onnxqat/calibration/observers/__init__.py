"""Clipping ranges from data: what each observer keeps of a tensor, and the range it picks.

Pure numpy; knows no graph and no runtime. An observer is fed batch by batch, and keeps no sample.
Several observers may share the batches between them: merged in the order of the batches, they
pick the range that one would have picked, bit for bit.

==================  ====================================================================
`extremes`          smallest and largest values: of all data, or averaged over batches
`percentile`        all but a share of the values
`squared_error`     least mean squared quantization error
`divergence`        least Kullback-Leibler divergence of the histograms
`analytic`          least error under a Gaussian or a Laplace density (ACIQ)
`auto`              whichever of these leaves the least squared error
`weights`           the range of a weight, which is known whole
`histogram`         counts in bins that widen, for the observers that need a shape
==================  ====================================================================
"""

from onnxqat.calibration.observers.analytic import GaussObserver, LaplaceObserver
from onnxqat.calibration.observers.auto import AutoObserver
from onnxqat.calibration.observers.base import Observer, Range
from onnxqat.calibration.observers.divergence import (
    TensorrtDivergenceObserver,
    TpuMlirDivergenceObserver,
)
from onnxqat.calibration.observers.extremes import (
    AverageObserver,
    MinMaxObserver,
    MovingAverageObserver,
)
from onnxqat.calibration.observers.percentile import PercentileObserver
from onnxqat.calibration.observers.squared_error import MseObserver
from onnxqat.calibration.observers.weights import weight_method, weight_range

__all__ = [
    "OBSERVERS",
    "Observer",
    "Range",
    "weight_method",
    "weight_range",
]

OBSERVERS: dict[str, type[Observer]] = {
    "mse": MseObserver,
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "average": AverageObserver,
    "percentile": PercentileObserver,
    "kl-tensorrt": TensorrtDivergenceObserver,
    "kl-tpu-mlir": TpuMlirDivergenceObserver,
    "aciq-gauss": GaussObserver,
    "aciq-laplace": LaplaceObserver,
    "auto": AutoObserver,
}
