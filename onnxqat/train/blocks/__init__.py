"""Block reconstruction: train one part of the graph at a time against the float model's tensors.

====================  ============================================================================
`cut`                 the cutting of the graph into blocks
`parts`               a block as a separate model
`activations`         tensors of the samples between the blocks, in memory and on disk
`block`               the training of one block
`rounding`            the rounding of its weights, where that is learned
`run`                 all blocks, one after the other
====================  ============================================================================
"""

from onnxqat.train.blocks.cut import Block, cut
from onnxqat.train.blocks.run import BlockFigures, Reconstructed, Reconstruction

__all__ = ["Block", "BlockFigures", "Reconstructed", "Reconstruction", "cut"]
