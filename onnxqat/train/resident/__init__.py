"""Training that keeps its arrays on a device, such as a GPU, between steps.

====================  ============================================================================
`arrays`              float32 vectors on a device, and the position of each parameter in them
`graphs`              the small graphs: the optimizer's step, averages, sums
`operations`          averages and sums of whole vectors
`updater`             one step of the optimizer
`bound`               a session of the training graph that works on the vectors in place
`capture`             the same, replayed as a CUDA graph
`replayable`          which graphs can be replayed
`step`                the loss and the gradients of a batch
`feeds`               batches on the device, with the teacher's outputs; a thread prepares them
`ranges`              clipping ranges that follow the observed extremes
`range_graphs`        their graphs
`blocks`, `rounding`  the training of one block, and of the rounding of its weights
`descent`             the state that training changes; `onnxqat.train.descent` has it in numpy
====================  ============================================================================

A step uploads a batch and downloads two numbers: the loss, and whether every gradient is finite.
Sessions read and write the vectors in place through IO binding. The same code runs on the CPU,
where it is tested.
"""
