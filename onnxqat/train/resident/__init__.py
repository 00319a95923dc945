"""Training that keeps its arrays on a device, such as a GPU, between steps.

====================  ============================================================================
`arrays`              float32 vectors on a device, and the position of each parameter in them
`graphs`              the small graphs: the optimizer's step, averages, sums
`updater`             one step of the optimizer
`step`                the loss and the gradients of a batch
`feeds`               batches on the device, with the teacher's outputs; a thread prepares them
`descent`             the state that training changes; `onnxqat.train.descent` has it in numpy
====================  ============================================================================

A step uploads a batch and downloads two numbers: the loss, and whether every gradient is finite.
Sessions read and write the vectors in place through IO binding. The same code runs on the CPU,
where it is tested.
"""
