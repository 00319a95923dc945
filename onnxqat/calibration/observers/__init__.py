"""Observers: choose the clipping range of a tensor from its values.

Pure numpy, without graphs or runtimes. An observer is fed batch by batch, and does not keep
samples. Several observers may each see a part of the batches: merged in the order of the batches,
they choose the same range as a single observer, bit for bit.

==================  ====================================================================
`extremes`          smallest and largest values: of all data, or averaged over batches
`percentile`        range without a fraction of the values at each end
`squared_error`     least mean squared quantization error
`divergence`        least Kullback-Leibler divergence of the histograms
`analytic`          least error under a Gaussian or a Laplace density (ACIQ)
`auto`              the range of these with the least squared error
`weights`           ranges of weights
`histogram`         the histogram of values that several observers use
==================  ====================================================================
"""

from onnxqat.calibration.observers.analytic import GaussObserver, LaplaceObserver
from onnxqat.calibration.observers.auto import AutoObserver
from onnxqat.calibration.observers.base import Observer, Range, Seen
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
from onnxqat.calibration.observers.squared_error import MseObserver, SquaredError
from onnxqat.calibration.observers.weights import weight_method, weight_range

__all__ = [
    "OBSERVERS",
    "Observer",
    "Range",
    "Seen",
    "SquaredError",
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
