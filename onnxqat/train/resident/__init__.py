"""Training whose arrays stay on a device between steps, as on a GPU.

====================  ============================================================================
`arrays`              float32 vectors on a device, and where in them each parameter lies
`graphs`              the small graphs: the optimizer's step, averages, sums
`updater`             one step of the optimizer
`step`                loss and gradients of a batch
`feeds`               batches on the device, with the teacher's outputs; made ahead by a thread
`descent`             all that training changes, as `onnxqat.train.descent` has it in numpy
====================  ============================================================================

A step uploads a batch and downloads two numbers: the loss, and whether every gradient is finite.
Sessions read and write the vectors in place by IO binding. On the CPU it works the same way, which
is how it is tested.
"""
